"""What each document taught is kept as plain transformers and PEFT load it, and they score with it what the run scored."""

import json

import pytest
import safetensors.torch
import torch
from lightning.pytorch import Trainer
from models import tiny
from peft import PeftModel
from running import Experts, random_tokens, run
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from dynlight import All, DynamicEvaluation, LoRA, Matching, Overlapping, Pretrained, SettingError
from dynlight.recording.kept import Keep, Kept, _as_file_name

SEGMENT, READ = 8, 4  # segments, after which what was learned is kept
DOCUMENTS = [random_tokens(length, seed) for seed, length in enumerate((48, 43, 61))]
# Wide rates: what is learned must move the nats by much more than the tolerance.
UPDATES = {
    "AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.01),
    "SGD": lambda weights: torch.optim.SGD(weights, lr=0.2),
}


def nats_of_next(model, tokens, segments=READ):
    """Nats of the segment that follows, by a plain forward over it alone; the prefix is token 0."""
    start = segments * SEGMENT
    inputs = torch.tensor([[0, *tokens]])[:, start : start + SEGMENT]
    targets = torch.tensor(tokens)[start : start + SEGMENT]
    with torch.no_grad():
        logits = model(input_ids=inputs).logits[0].float()
    return F.cross_entropy(logits, targets, reduction="sum").item()


def loaded(base, folder):
    """The model with what is kept, by transformers and PEFT alone."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32").eval()
    if (folder / "adapter_config.json").exists():
        return PeftModel.from_pretrained(model, folder).eval()
    _, unexpected = model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
    assert not unexpected
    return model


@pytest.mark.filterwarnings("ignore:read one row after another")  # adapters of an embedding
@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
@pytest.mark.parametrize(
    ("architecture", "parameters"),
    [
        ("llama", LoRA(rank=3, alpha=5, ranks={"q_proj": 2})),
        ("gpt2", LoRA(rank=3, targets=["c_attn", "wte"])),
        ("llama", All()),
        ("qwen3", Matching("mlp|norm", [1, 2])),
    ],
    ids=["LoRA", "LoRA of an embedding", "All", "Matching"],
)
def test_the_next_segment_has_the_nats_of_the_run(tmp_path, architecture, parameters, update, together):
    base = tmp_path / "base"
    tiny(architecture).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    what = "adapters" if parameters.are_adapters else "weights"
    done = run(
        model,
        DOCUMENTS,
        Overlapping(SEGMENT, SEGMENT),
        [Kept(tmp_path, Keep(what, at=READ))],
        together,
        parameters=parameters,
        update=update,
        reference="static",
    )
    for index, tokens in enumerate(DOCUMENTS):
        folder = tmp_path / f"kept/{index}-document-{index}"
        expected = done.nats[index][READ].double().sum().item()
        assert nats_of_next(loaded(base, folder / f"segment-{READ}"), tokens) == pytest.approx(expected, rel=1e-6)
        plain = AutoModelForCausalLM.from_pretrained(base).eval()
        assert nats_of_next(plain, tokens) != pytest.approx(expected, rel=5e-5)
        # At its end, what all segments taught: more than the first ones.
        whole, early = (nats_of_next(loaded(base, each), tokens) for each in (folder, folder / f"segment-{READ}"))
        assert whole != early
        card = (folder / "README.md").read_text()
        protocol = done.module.protocol.replace("|", "\\|")
        assert f"{len(tokens)} tokens" in card and f"base_model: {base}" in card and protocol in card
    if what == "weights" and architecture == "qwen3":
        kept = load_file(tmp_path / "kept/0-document-0/weights.safetensors")
        assert {name.split(".")[2] for name in kept} == {"1", "2"}


def test_of_several_rules_each_is_kept_and_the_best_in_front(tmp_path):
    base, rates = tmp_path / "base", [1e-4, 0.05, 1e-3]
    tiny().save_pretrained(base)
    experts = Experts()
    run(
        AutoModelForCausalLM.from_pretrained(base),
        DOCUMENTS,
        Overlapping(SEGMENT, SEGMENT),
        [experts, Kept(tmp_path, Keep("adapters", at=READ))],
        2,
        parameters=LoRA(rank=2),
        update=torch.optim.AdamW,
        rates=rates,
        reference="static",
    )
    chosen = []
    for index, tokens in enumerate(DOCUMENTS):
        folder = tmp_path / f"kept/{index}-document-{index}" / f"segment-{READ}"
        names = sorted(path.name for path in (folder / "rules").iterdir())
        assert names == ["0-AdamW-lr-0.0001", "1-AdamW-lr-0.05", "2-AdamW-lr-0.001"]
        of_rules = [nats[1:] for nats in experts.nats[index]]  # behind static
        for rule, name in enumerate(names):
            expected = of_rules[READ][rule].sum(dtype=float)
            assert nats_of_next(loaded(base, folder / "rules" / name), tokens) == pytest.approx(expected, rel=1e-6)
        best = min(range(3), key=lambda rule: sum(nats[rule].sum(dtype=float) for nats in of_rules[:READ]))
        expected = of_rules[READ][best].sum(dtype=float)
        assert nats_of_next(loaded(base, folder), tokens) == pytest.approx(expected, rel=1e-6)
        chosen.append(best)
    assert set(chosen) <= {0, 1, 2}


def test_a_model_card_says_how_the_model_is_loaded(tmp_path, byte_tokenizer):
    """Its code is run as it stands: in float32, whatever the base is saved in."""
    base = tmp_path / "base"
    tiny().bfloat16().save_pretrained(base)
    byte_tokenizer.save_pretrained(base)
    source = Pretrained(str(base), dtype="bfloat16")
    for parameters, what in ((LoRA(rank=3), "adapters"), (All(), "weights")):
        kept = Kept(tmp_path / what, Keep(what, at=READ), source.how_to_load())
        windows = Overlapping(SEGMENT, SEGMENT)
        model = AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16" if what == "adapters" else "float32")
        done = run(model, DOCUMENTS[:1], windows, [kept], parameters=parameters, update=UPDATES["AdamW"])
        folder = tmp_path / what / f"kept/0-document-0/segment-{READ}"
        code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        found = {"AutoModelForCausalLM": AutoModelForCausalLM, "PeftModel": PeftModel, "safetensors": safetensors}
        exec(code.replace("this folder", str(folder)), found)
        tolerance = 1e-3 if what == "adapters" else 1e-6  # a bf16 model is read in bf16 by the run
        expected = done.nats[0][READ].double().sum().item()
        assert nats_of_next(found["model"].eval(), DOCUMENTS[0]) == pytest.approx(expected, rel=tolerance)


def test_names_of_documents_are_names_of_files():
    assert _as_file_name("../../etc/passwd") == "etc-passwd"
    assert _as_file_name("|") == "document"
    assert len(_as_file_name("✓é" * 200).encode()) <= 120


def test_the_configuration_is_that_of_the_adapter(tmp_path):
    base = tmp_path / "base"
    tiny().save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    kept = Kept(tmp_path, Keep("adapters"))
    run(model, DOCUMENTS[:1], Overlapping(8, 8), [kept], parameters=LoRA(rank=3, alpha=5), update=UPDATES["SGD"])
    config = json.loads((tmp_path / "kept/0-document-0/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 5, "LORA")
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", str(base))
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(config["target_modules"]) == linear  # by name, which every server of adapters understands
    assert [path.name for path in (tmp_path / "kept/0-document-0").iterdir() if path.is_dir()] == []


def test_nothing_is_kept_of_a_document_that_failed(tmp_path):
    model = tiny()
    kept = Kept(tmp_path, Keep("weights"))
    run(model, DOCUMENTS[:1], Overlapping(8, 8), [kept], update=lambda weights: torch.optim.SGD(weights, lr=1e9))
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("what", "choices", "message"),
    [
        ("adapters", {"parameters": All()}, "keep must be weights with parameters all weights, got adapters"),
        ("weights", {"parameters": LoRA()}, "keep must be adapters with parameters LoRA"),
        ("weights", {"update": None}, "keep must be null where nothing is learned, got weights; choose an update"),
    ],
)
def test_what_is_not_learned_cannot_be_kept(what, choices, message):
    choices = {"update": UPDATES["SGD"]} | choices
    module = DynamicEvaluation(tiny(), None, context=Overlapping(8, 8), **choices)
    with pytest.raises(SettingError, match=message.replace("(", r"\(")):
        Keep(what).check(module, Trainer(accelerator="cpu", logger=False))
