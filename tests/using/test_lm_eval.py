"""Tasks of lm-evaluation-harness, with a model that learns as it reads."""

import json
import math
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import lm_eval
import pandas as pd
import pytest
import yaml
from datasets import Dataset
from folders import DOCUMENTS, configuration, save_documents, save_model
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from dynlight import SettingError, fit, tasks
from dynlight.using.harness import DynamicLM, arguments_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lm_eval", "ignore::ResourceWarning")

ROOT = Path(__file__).parents[2]
WORDS = ["river", "house", "stood", "still"]  # one token each
CHOICES = {"segment": 16, "memory": 48, "update": "SGD", "lr": 0.05}
STATIC = CHOICES | {"lr": 0.0}
LEARNER = CHOICES | {"learn": "context", "lr": 0.2}


def task(kind, rows, **settings):
    """A task of lm-eval over rows in memory."""
    usual = {
        "task": kind,
        "output_type": kind,
        "test_split": "test",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
    }
    return usual | settings


def rolling(texts):
    return task("loglikelihood_rolling", [{"text": text} for text in texts], doc_to_text="", doc_to_target="{{text}}")


# Which word stood there again and again? It is not the one that stands last.
ASKED = [{"context": f" the old {word}" * 12 + " the old", "answer": place} for place, word in enumerate(WORDS)]


def chosen():
    return task("multiple_choice", ASKED, doc_to_text="{{context}}", doc_to_target="answer", doc_to_choice=WORDS)


def continued(**settings):
    settings = {"until": ["\n"], "max_gen_toks": 6} | settings
    return task("generate_until", ASKED, doc_to_text="{{context}}", doc_to_target="answer", generation_kwargs=settings)


@pytest.fixture(scope="module")
def model(tmp_path_factory, byte_tokenizer):
    """A tiny model of 256 positions with a chat template."""
    byte_tokenizer = type(byte_tokenizer)(
        tokenizer_object=byte_tokenizer.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}",
    )
    return save_model(tmp_path_factory.mktemp("lm_eval") / "model", byte_tokenizer, max_position_embeddings=256)


def of_hf(model, **settings):
    return HFLM(str(model), device="cpu", dtype="float32", **settings)


def of_dynlight(model, choices=CHOICES, **settings):
    return DynamicLM(pretrained=str(model), device="cpu", **choices, **settings)


def evaluate(lm, *tasks, **settings):
    manager = TaskManager(include_defaults=False)  # whose thousands of YAMLs take seconds
    return lm_eval.simple_evaluate(lm, tasks=list(tasks), bootstrap_iters=0, task_manager=manager, **settings)


def responses(lm, *tasks):
    """What the model said to each request of each task."""
    samples = evaluate(lm, *tasks)["samples"]
    return {name: [sample["filtered_resps"] for sample in of_task] for name, of_task in samples.items()}


def assert_like(found, expected):
    """Log-likelihoods to 1e-4, and the same answers to whether they are greedy."""
    assert [[greedy for _, greedy in each] for each in found] == [[greedy for _, greedy in each] for each in expected]
    flat = [likelihood for each in expected for likelihood, _ in each]
    assert [likelihood for each in found for likelihood, _ in each] == pytest.approx(flat, abs=1e-4)


# Rolling log-likelihoods


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"update": {"class_path": "AdamW", "init_args": {"lr": 1e-3}}, "parameters": {"class_path": "LoRA"}},
        {"update": None, "mixture": {}},
        {"context": {"class_path": "Overlapping", "init_args": {"segment": 16, "window": 40}}, "update": None},
    ],
    ids=["all weights", "adapters", "mixture", "static windows"],
)
def test_a_rolling_task_gives_the_nats_of_fit(model, tmp_path, changes):
    config = configuration(model, save_documents(tmp_path / "documents"), tmp_path / "out") | changes
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), "utf-8")
    assert fit.main(["--config", str(tmp_path / "run.yaml")]) == 0
    expected = pd.read_csv(tmp_path / "out/documents.csv", dtype={"nats": str})["nats"].map(float).tolist()
    found = evaluate(DynamicLM(config=str(tmp_path / "run.yaml")), rolling(DOCUMENTS.values()))
    samples = found["samples"]["loglikelihood_rolling"]
    assert [-sample["filtered_resps"][0] for sample in samples] == expected
    size = sum(len(text.encode()) for text in DOCUMENTS.values())
    perplexity = found["results"]["loglikelihood_rolling"]["byte_perplexity,none"]
    assert perplexity == pytest.approx(math.exp(sum(expected) / size))


def test_texts_may_be_read_together(model):
    alone, together = (responses(of_dynlight(model, together=count), rolling(DOCUMENTS.values())) for count in (1, 2))
    pairs = zip(alone["loglikelihood_rolling"], together["loglikelihood_rolling"], strict=True)
    assert all(one == pytest.approx(other, rel=1e-5) for one, other in pairs)


def test_an_empty_text_costs_nothing(model):
    request = type("Request", (), {"args": ("",)})
    assert of_dynlight(model).loglikelihood_rolling([request]) == [0.0]


def test_a_text_that_is_not_read_to_its_end_is_named(model):
    with pytest.raises(SettingError, match="text 0 must be read to its end, got stopped in segment 1"):
        evaluate(of_dynlight(model, CHOICES | {"lr": 1e12}), rolling(DOCUMENTS.values()))


# Contexts and continuations


@pytest.mark.parametrize(
    "choices",
    [
        CHOICES,
        STATIC | {"learn": "context"},
        STATIC | {"learn": "context", "parameters": "LoRA", "rank": 4},
        CHOICES | {"mixture": {}, "update": None, "lr": None},
    ],
    ids=["nothing learned", "rate 0", "adapters at rate 0", "a mixture of rolling texts"],
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_learns_nothing_answers_as_hf(model, choices, batch_size):
    choices = {name: value for name, value in choices.items() if name != "lr" or value is not None}
    lm = of_dynlight(model, choices, batch_size=batch_size)
    evaluate(lm, rolling(DOCUMENTS.values()))  # which leaves nothing behind
    found, expected = (responses(each, chosen(), continued()) for each in (lm, of_hf(model)))
    assert_like(found["multiple_choice"], expected["multiple_choice"])
    assert found["generate_until"] == expected["generate_until"]


@pytest.mark.parametrize("context", ["", "A fine day", " river" * 200, " trailing space "])
def test_contexts_are_cut_and_tokenized_as_by_hf(model, context):
    requests = [type("Request", (), {"args": (context, word)}) for word in (" river", "s", " the house")]
    for settings in ({}, {"max_length": 12}):
        found, expected = (
            each.loglikelihood(requests)
            for each in (of_dynlight(model, STATIC | {"learn": "context"}, **settings), of_hf(model, **settings))
        )
        assert_like([found], [expected])


def test_the_likeliest_continuation_is_greedy(model):
    lm = of_dynlight(model, LEARNER)
    context = " river" * 12
    (likeliest,) = lm.generate_until([type("Request", (), {"args": (context, {"max_gen_toks": 3})})])
    requests = [type("Request", (), {"args": (context, text)}) for text in (likeliest, " whale")]
    (first, is_greedy), (second, other_is_greedy) = lm.loglikelihood(requests)
    assert first > second
    assert is_greedy and not other_is_greedy


def test_a_context_that_is_learned_from_tells_the_answer(model):
    found = [evaluate(of_dynlight(model, choices), chosen(), continued()) for choices in (CHOICES, LEARNER)]
    assert [each["results"]["multiple_choice"]["acc,none"] for each in found] == [0.25, 1.0]
    answers = [sample["filtered_resps"][0] for sample in found[1]["samples"]["generate_until"]]
    assert [answer.split()[0] for answer in answers] == WORDS
    assert [sample["filtered_resps"][0] for sample in found[0]["samples"]["generate_until"]] != answers


@pytest.mark.parametrize(
    "changes", [{}, {"parameters": "LoRA", "rank": 4}, {"context": "Overlapping", "window": 40, "memory": None}]
)
def test_a_context_is_forgotten_before_the_next_and_its_continuations_teach_nothing(model, changes):
    request = type("Request", (), {"args": (" river" * 12, " house")})
    other = type("Request", (), {"args": (" while" * 12, " house house house house")})
    choices = {name: value for name, value in (LEARNER | changes).items() if value is not None}
    ((alone, _),) = of_dynlight(model, choices).loglikelihood([request])
    lm = of_dynlight(model, choices)
    behind = lm.loglikelihood([other, request, other, request])
    assert behind[1][0] == behind[3][0] == alone
    assert lm.loglikelihood([request])[0][0] == alone
    assert of_dynlight(model, STATIC).loglikelihood([request])[0][0] != alone


def test_a_continuation_is_scored_by_the_weights_that_a_reader_has_after_the_context(model):
    lm = of_dynlight(model, LEARNER)
    context = " river house" * 20
    ((found, _),) = lm.loglikelihood([type("Request", (), {"args": (context, " lines")})])
    tokenizer, reader = lm.tokenizer, lm.reader
    reader.forget()
    reader.read(context)
    inputs = tokenizer(context + " lines", return_tensors="pt")["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    with reader.weights() as adapted:
        nats = -adapted(inputs).logits.log_softmax(-1)[0, start - 1 : -1].gather(1, inputs[0, start:, None]).sum()
    assert found == pytest.approx(-nats.item(), abs=1e-4)


def test_stop_strings_and_sampling_are_those_of_hf(model):
    (stopped,) = {text for (text,) in responses(of_hf(model), continued())["generate_until"][:1]}
    settings = {"until": [stopped[2]]}
    found, expected = (responses(each, continued(**settings)) for each in (of_dynlight(model), of_hf(model)))
    assert found == expected
    assert found["generate_until"][0] == [stopped.partition(stopped[2])[0]]
    sampled = [
        responses(each, continued(do_sample=True, temperature=1.0, max_gen_toks=4))["generate_until"]
        for each in (of_dynlight(model), of_hf(model))
    ]
    assert sampled[0] == sampled[1]


# Names, results, settings


def test_lm_eval_knows_the_model_by_its_name():
    assert get_model("dynlight") is DynamicLM
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    module, _, name = project["entry-points"]["lm_eval.models"]["dynlight"].partition(":")
    assert getattr(import_module(module), name) is DynamicLM


@pytest.mark.parametrize(("learn", "kinds"), [("none", 1), ("context", 2)])
def test_the_results_say_what_was_learned(model, learn, kinds):
    arguments = f"pretrained={model},update=SGD,lr=0.05,segment=16,memory=48,learn={learn}"
    results = evaluate("dynlight", chosen(), model_args=arguments, device="cpu")
    config = json.loads(json.dumps(results["config"], default=str))
    assert config["model"] == "dynlight"
    assert config["dynlight"] == "0.1.0"
    assert config["learn"] == learn
    assert len(config["learned_from"]) == kinds
    expected = "context TransformerXL(segment 16, memory 48) · learns all weights · by SGD(lr 0.05)"
    assert config["protocol"].startswith(expected)


def test_chat_templates_are_those_of_hf(model):
    lm, hf = of_dynlight(model), of_hf(model)
    history = [{"role": "user", "content": "a fine day"}]
    assert lm.apply_chat_template(history) == hf.apply_chat_template(history) == "user: a fine day\n"
    assert lm.chat_template(True) == hf.chat_template(True)
    assert lm.tokenizer_name == hf.tokenizer_name


def test_settings_are_those_of_fit():
    settings = {"pretrained": "x", "lr": 0.5, "segment": 8, "window": 16, "update": "SGD", "update.momentum": 0.9}
    assert sorted(arguments_of(None, settings)) == [
        "--context.segment=8",
        "--context.window=16",
        "--context=Overlapping",
        "--data.path=requests of lm-eval",
        "--model.pretrained=x",
        "--update.lr=0.5",
        "--update.momentum=0.9",
        "--update=SGD",
    ]
    assert arguments_of("run.yaml", {"reference": None, "rates": [0.1]}) == [
        "--config=run.yaml",
        "--reference=null",
        "--rates=[0.1]",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learn": "all"}, "learn must be none or context, got all"),
        ({"foo": 1}, "foo is not a setting"),
        ({"lr": "x"}, "update.lr must be a number, got x"),
        ({"device": "cuda:1"}, "device must be the first, got cuda:1; choose another by CUDA_VISIBLE_DEVICES"),
        ({"learn": "context", "update": None}, "learn must be none where nothing learns, got context"),
        ({"learn": "context", "rates": [0.1, 0.2]}, "rates must be left out with learn=context"),
        ({"learn": "context", "mixture": {}}, "mixture must be left out with learn=context"),
        (
            {
                "learn": "context",
                "memories": [{"class_path": "NGrams", "init_args": {"order": 3, "concentration": 2.0}}],
            },
            "memories must be left out with learn=context",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_what_cannot_be_run_is_named(model, changes, message):
    settings = {"pretrained": str(model), "segment": 16, "memory": 48, "update": "SGD"} | changes
    with pytest.raises(SettingError, match=message.replace("(", "[(]")):
        DynamicLM(**settings)


@pytest.mark.slow
def test_the_command_runs_tasks_and_writes_down_what_was_learned(model, tmp_path):
    pd.DataFrame(ASKED).to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    own = chosen() | {"task": "own", "dataset_path": "json"}
    own |= {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    del own["custom_dataset"]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own), "utf-8")
    settings = f"pretrained={model},segment=16,memory=48,update=SGD,lr=0.2,learn=context"
    command = [sys.executable, "-m", "dynlight.tasks", "--tasks", "own", "--model_args", settings]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(path.read_text("utf-8"))
    assert results["results"]["own"]["acc,none"] == 1.0
    assert results["config"]["learn"] == "context"
    assert "by SGD(lr 0.2)" in results["config"]["protocol"]


def test_the_door_ends_with_one_line_for_an_error(model, capsys, monkeypatch):
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)  # it would change that of all tests
    settings = f"pretrained={model},segment=16,memory=48,foo=1"
    assert tasks.main(["--tasks", "arc_easy", "--model_args", settings]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: foo is not a setting")
    assert tasks.main([]) == 0
    assert "usage: python -m dynlight.tasks" in capsys.readouterr().out
