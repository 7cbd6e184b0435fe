"""The examples of stored weights on the Llama that lies beside them, executed after all passes instead of compiled.

What would break: a checkpoint with a tied head that is not packed, an arm that trains or generates something else, a
file that is missing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

import qcompile

from ..loops.worker import backend_of

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("tests the source tree", allow_module_level=True)
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
sys.path.insert(0, str(EXAMPLES))
import finetune_qlora  # noqa: E402
import serve  # noqa: E402

sys.path.remove(str(EXAMPLES))

MODEL = EXAMPLES / "data" / "stories260K"


@pytest.mark.slow
def test_adapters_learn_beside_our_bytes_what_they_learn_beside_bitsandbytes(tmp_path, monkeypatch, capsys):
    """LoftQ and INT4 are run without compilation, which is quicker."""
    compiled = {"NF4": backend_of("qcompile_stored")}
    arms = {name: arm._replace(backend=compiled.get(name, "")) for name, arm in finetune_qlora.ARMS.items()}
    monkeypatch.setattr(finetune_qlora, "ARMS", arms)
    sizes = ["--steps", "4", "--batch", "2", "--context", "32", "--characters", "20000", "--validate", "2"]
    given = [*sizes, "--arms", *arms, "--device", "cpu", "--out", str(tmp_path)]
    assert finetune_qlora.main(given) == 0
    runs = {run["arm"]: run for run in json.loads((tmp_path / "finetune_qlora.json").read_text())}
    assert list(runs) == list(arms)
    wide, theirs, ours = runs["BF16"], runs["bitsandbytes NF4"], runs["NF4"]
    for run in runs.values():
        assert run["after"] < run["before"] - 0.05
        assert len(run["losses"]) == 4
        assert (run["model_mb"] < 0.75 * wide["model_mb"]) == (run is not wide)
    rounding = abs(ours["before"] - wide["before"])
    assert abs(ours["before"] - theirs["before"]) < 0.1 * rounding
    assert abs(ours["after"] - theirs["after"]) < 0.1 * rounding
    assert runs["NF4, LoftQ"]["before"] != ours["before"]  # its adapters begin with what rounding takes away
    assert ours["saved_mb"] < theirs["saved_mb"]
    assert (tmp_path / "finetune_qlora.png").stat().st_size > 10_000
    assert "INT4" in capsys.readouterr().out.rpartition("weights")[2]  # the table
    assert finetune_qlora.main([*given, "--model", str(tmp_path / "nowhere")]) == 2
    assert "finetune_qlora: " in capsys.readouterr().err


def test_the_compiled_model_generates_what_the_packed_one_does_without_compilation():
    """With a static cache, in float32, in which there are no ties."""
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    assert len(qcompile.pack_(model, serve.NF4).layers) == 35
    ids = serve.prompted(tokenizer, "Once upon a time", "cpu")
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    torch._dynamo.utils.counters.clear()
    output = serve.generated(model, ids, 6, backend_of("qcompile_stored"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(output, plain)
    assert serve.off_by(model, output, ids.shape[1]) == 0
    output[0, -1] += 1
    assert serve.off_by(model, output, ids.shape[1]) > 0


def test_a_prompt_is_a_message_where_the_model_chats():
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    plain = serve.prompted(tokenizer, "Hello", "cpu")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %} assistant:"
    assert tokenizer.decode(plain[0]).endswith("Hello")
    assert tokenizer.decode(serve.prompted(tokenizer, "Hello", "cpu")[0]).endswith("user: Hello assistant:")
