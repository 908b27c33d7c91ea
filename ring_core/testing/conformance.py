class Conformance: pass
