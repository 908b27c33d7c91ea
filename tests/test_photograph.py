"""The demo on a photograph: patches and back, and a quick run that agrees with itself unsharded."""

from __future__ import annotations

import json

import pytest
import torch
from ring_attention_hilbert.demo.__main__ import main
from ring_attention_hilbert.demo.photograph import grid_of, load, patches, picture


def test_patches_and_back():
    photograph = load(None)
    assert photograph.shape == (600, 512, 3)
    assert 0 <= photograph.min() < 0.1 < 0.9 < photograph.max() <= 1
    grid = grid_of(photograph, 7)
    assert grid == (85, 73)
    parts = patches(photograph, 7)
    assert parts.shape == (85 * 73, 147)
    assert torch.equal(picture(parts, grid, 7), photograph[:595, :511])
    assert torch.equal(parts[74], photograph[7:14, 7:14].flatten())


def test_a_quick_run_agrees_and_writes_both(tmp_path, capsys, monkeypatch, launch_here):
    monkeypatch.setattr("ring_attention_hilbert.demo.__main__.launch", launch_here)
    words = ["--processes", "2", "--patch", "24", "--steps", "5", "--output", str(tmp_path)]
    assert main(words) == 0
    found = json.loads((tmp_path / "photograph.json").read_text())
    assert found["settings"]["patches"] == 25 * 21
    assert found["largest_difference"] < 1e-4
    assert found["losses_sharded"][-1] < found["losses_sharded"][0]
    assert sum(one["patches"] for one in found["ranks"]) == 25 * 21
    assert all(one["attention_bytes_sent"] > 0 for one in found["ranks"])
    assert (tmp_path / "photograph.png").read_bytes().startswith(b"\x89PNG")
    assert "Losses of both runs differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--patch", "700"], "no patch of 700 x 700; give a smaller --patch"),
        (["--input", "nowhere.jpg"], "cannot read --input nowhere.jpg"),
    ],
)
def test_bad_options(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err
