"""Importing rmcore is cheap and brings in nothing that is not asked for."""

from __future__ import annotations

import json

from support.warm import WarmPython

SCRIPT = """
import json, sys, time
before = set(sys.modules)
start = time.perf_counter()
import rmcore
bare = time.perf_counter() - start
for name in rmcore.__all__:
    getattr(rmcore, name)
everything = time.perf_counter() - start
new = {m.partition(".")[0] for m in set(sys.modules) - before}
print(json.dumps({"bare": bare, "everything": everything, "new": sorted(new)}))
"""


def test_import_pulls_in_neither_models_nor_clients(capsys, torch_python: WarmPython):
    done = torch_python.start(SCRIPT)
    out, errors = done.communicate()
    assert done.returncode == 0, errors
    result = json.loads(out)
    new = set(result["new"])
    assert not new & {"transformers", "tokenizers", "httpx", "anyio", "triton", "safetensors", "matplotlib", "typer"}
    assert not new & {"scipy", "pydantic", "prometheus_client", "fastapi"}
    with capsys.disabled():  # the time is for people: a busy machine must not fail a test
        print(f"\nimport rmcore, beyond torch: {result['bare']:.3f} s, "
              f"with every public name {result['everything']:.3f} s")  # fmt: skip


def test_unknown_names_are_attribute_errors_and_public_ones_are_listed():
    import rmcore

    assert set(rmcore.__all__) <= set(dir(rmcore))
    assert not hasattr(rmcore, "no_such_thing")
