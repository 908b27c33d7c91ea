"""The training scripts: losses and gradients of one process, restarts after a rank was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from job import Settings, Step
from packed_text import NO_LABEL, PackedText
from recovery import process_of
from ring_attention_distributed.checkpoints import Checkpoints
from torch import nn
from torch.nn import functional as F

from ring_core.demo.model import LanguageModel, Rotary
from ring_core.errors import CheckpointError
from ring_core.launching import launch
from ring_core.testing import RankPool, Worker

EXAMPLES = Path(__file__).parents[1] / "examples"
SETTINGS = Settings(tokens=601, sequences=4, steps=3, width=32, layers=2, heads=4)


def one_process(settings: Settings) -> list[Step]:
    """The same training with torch alone: whole sequences, one mean over all labels of a step."""
    torch.manual_seed(settings.seed)
    model = LanguageModel(settings.size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    text = PackedText(settings.text, settings.tokens)
    done = []
    for step in range(1, settings.steps + 1):
        numbers = range(step * settings.sequences, (step + 1) * settings.sequences)
        logits, labels = [], []
        for sequence in map(text.sequence, numbers):
            positions = torch.arange(settings.tokens)
            document = torch.bucketize(positions, torch.tensor(sequence.starts[1:]), right=True)
            seen = (document[:, None] == document) & (positions[:, None] >= positions)

            def attend(q: Any, k: Any, v: Any, seen: Any = seen) -> Any:
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)

            rotary = Rotary(positions, settings.size.head_dim, torch.device("cpu"))
            logits.append(model(sequence.ids[None], rotary, attend)[0])
            labels.append(sequence.labels)
        loss = F.cross_entropy(torch.cat(logits), torch.cat(labels), ignore_index=NO_LABEL)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done.append(Step(step, float(loss.detach()), float(norm)))
    return done


def same(found: list[Step], settings: Settings) -> None:
    """Whether steps are the first of what one process comes to."""
    expected = {one.step: one for one in one_process(settings)}
    assert found
    for one in found:
        assert one.loss == pytest.approx(expected[one.step].loss, rel=1e-5), one
        assert one.gradient_norm == pytest.approx(expected[one.step].gradient_norm, rel=1e-4), one


def with_fsdp2(worker: Worker, settings: Settings) -> list[Step]:
    from train_fsdp2 import train

    return list(train(settings, worker.device))


@pytest.mark.parametrize(("ring", "sequences"), [(2, 4), (8, 2)])
def test_fsdp2_trains_as_one_process(cpu_pool: RankPool, ring: int, sequences: int) -> None:
    """Rings beside each other, and one of all ranks; labels differ in number between ranks."""
    settings = replace(SETTINGS, ring=ring, sequences=sequences)
    for steps in cpu_pool.run(with_fsdp2, settings):
        assert [one.step for one in steps] == [1, 2, 3]
        same(steps, settings)


def with_deepspeed(worker: Any, settings: Settings) -> list[Step]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # An operator for inference over shared memory, for which it would call a compiler first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    from train_deepspeed import train

    return list(train(settings, worker.device))


def test_deepspeed_trains_as_one_process() -> None:
    settings = replace(SETTINGS, ring=2)
    for steps in launch(with_deepspeed, settings, processes=2):
        same(steps, settings)


def history(path: Path) -> list[Step]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    said = [json.loads(line) for line in lines if line.endswith("\n")]
    return [Step(one["step"], one["loss"], one["gradient_norm"]) for one in said]


def test_a_job_goes_on_after_a_rank_was_killed(cpu_pool: RankPool, tmp_path: Path) -> None:
    """kill -9 in mid-training: the launcher starts all ranks again, and they go on from the last
    checkpoint on the same losses. So does a job of another world size."""
    settings = replace(SETTINGS, sequences=2, steps=24, every=2, tokens=257)
    settings = replace(settings, checkpoints=tmp_path / "run", history=tmp_path / "history")
    flags = [
        f"--{name}={getattr(settings, name)}"
        for name in ["tokens", "sequences", "steps", "every", "width", "checkpoints", "history"]
    ]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    job = subprocess.Popen(
        [sys.executable, "-m", *launcher, str(EXAMPLES / "train_fsdp2.py"), "--ring=2", *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 100
        while len(history(settings.history)) < 7:
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process_of(1, job.pid), signal.SIGKILL)
        said, _ = job.communicate(timeout=100)
    finally:
        job.kill()
    assert job.returncode == 0, said
    steps = history(settings.history)
    turns = [one.step for one in steps]
    again = next(i for i in range(1, len(turns)) if turns[i] <= turns[i - 1])
    assert turns[:again] == list(range(1, again + 1))
    assert turns[again:] == list(range(turns[again], settings.steps + 1))
    assert turns[again] > 4
    assert (turns[again] - 1) % settings.every == 0
    more = replace(settings, ring=4, steps=26)
    for further in cpu_pool.run(with_fsdp2, more):
        assert [one.step for one in further] == [25, 26]
        steps += further
    same(steps, more)


def tiny() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, optimizer


def learn(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(model: nn.Module) -> list[float]:
    return [float(x) for p in model.parameters() for x in p.detach().flatten()]


def unfinished(worker: Worker, folder: Path) -> None:
    model, optimizer = tiny()
    checkpoints = Checkpoints(folder, model, optimizer, keep=2)
    assert checkpoints.load() == 0
    held = {}
    for step in (1, 2, 3):
        learn(model, optimizer)
        held[step] = weights(model)
        checkpoints.save(step)
        with torch.no_grad():
            model.weight.fill_(7.0)  # what is written is what was there, not this
    checkpoints.finish()
    torch.distributed.barrier()
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]

    if worker.rank == 0:  # as after a job that was killed while it wrote the third
        (folder / "step-00000003" / ".metadata").unlink()
    torch.distributed.barrier()
    model, optimizer = tiny()
    checkpoints = Checkpoints(folder, model, optimizer)
    assert checkpoints.load() == 2
    assert weights(model) == held[2]
    assert optimizer.state[model.weight]["step"] == 2
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]
    torch.distributed.barrier()  # rank 0 writes next
    learn(model, optimizer)
    checkpoints.save(3)
    checkpoints.finish()


def test_checkpoints_count_once_they_are_whole(cpu_pool: RankPool, tmp_path: Path) -> None:
    """What is saved is the state of that moment; the last two stay; a torn one is none."""
    cpu_pool.run(unfinished, tmp_path)


def refused(worker: Worker, folder: Path) -> list[str]:
    model, optimizer = tiny()
    checkpoints = Checkpoints(folder / "run", model, optimizer)
    checkpoints.save(1)
    said = []

    def refuse(do: Any) -> None:
        with pytest.raises(CheckpointError) as caught:
            do()
        said.append(str(caught.value).replace(str(folder), "FOLDER"))

    refuse(lambda: checkpoints.save(1))
    refuse(lambda: checkpoints.save(0))
    other = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(other.parameters())
    refuse(lambda: Checkpoints(folder / "run", other, optimizer).load())
    refuse(lambda: Checkpoints(folder / "a file", model, optimizer))
    refuse(lambda: Checkpoints(folder, model, optimizer, keep=0))
    refuse(lambda: Checkpoints(folder, model, optimizer, {"training": optimizer}))
    torch.distributed.barrier()
    if worker.rank == 0:  # the disk is gone, say
        (folder / "run").rename(folder / "moved")
        (folder / "run").write_text("")
    torch.distributed.barrier()
    checkpoints.save(2)
    refuse(checkpoints.finish)
    return said


def test_checkpoints_refuse_on_every_rank(cpu_pool: RankPool, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    said = cpu_pool.run(refused, tmp_path)
    assert all(one == said[0] for one in said)
    print("\n".join(said[0]))
