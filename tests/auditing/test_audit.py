"""An audit finds every cheat of the zoo by the check that is made for it, and blames no honest scorer."""

import json
from functools import partial
from pathlib import Path

import cheats
import pytest
import torch
from cheats import CHEATS, HONEST, SEGMENT, VOCABULARY
from models import CONFIGS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dynlight import audit as auditing
from dynlight.audit import audit, main
from dynlight.auditing.run_scorer import AuditedRun, _document

SEEDS = range(20)
CONFIG_FILES = sorted(Path(__file__).parents[2].glob("configs/**/*.yaml"))
CONFIG_FILES = [file for file in CONFIG_FILES if "\ncontext:" in file.read_text()]
CONFIG_FILES = [file for file in CONFIG_FILES if "DDP" not in file.read_text()]  # an audit reads in one process
# One for each way through the code: weights in place, adapters whose contexts overlap, Krause's rule, a mixture, and with memories.
EVERY_WAY = ("quickstart", "document_lora", "krause_2018", "mixture", "memories")
LETTERS = "abcdefghij"


def audit_of(name, seed=0, policy="document", count=cheats.count, segment=SEGMENT, **knowledge):
    return audit(
        cheats.make_scorer(name, seed),
        cheats.documents(seed),
        vocabulary=VOCABULARY,
        policy=policy,
        segment=segment,
        make=partial(cheats.make_scorer, name, seed),
        count=count,
        tokenize=lambda text: list(text.encode()),
        sampler=partial(cheats.draw, seed),
        seed=seed,
        **knowledge,
    )


@pytest.fixture
def no_processes(monkeypatch):
    """A scorer made anew in this process: a process for each of hundreds of audits would take minutes."""
    monkeypatch.setattr(auditing, "FreshProcess", lambda make: make())


def is_caught(result, check):
    return not result.streamable if check == "truncation" else result[check].verdict == "failed"


@pytest.mark.parametrize(
    "seed",
    [
        SEEDS[0],
        *(pytest.param(seed, marks=pytest.mark.slow) for seed in SEEDS[1:3]),
        *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in SEEDS[3:]),
    ],
)
@pytest.mark.usefixtures("no_processes")
def test_the_zoo(seed):
    false_alarms = [name for name in HONEST if not audit_of(name, seed).honest]
    false_alarms += [name for name in ("state carried over",) if not audit_of(name, seed, "stream").honest]
    missed = []
    for name, cheat in CHEATS.items():
        result = audit_of(name, seed, cheat.policy, cheat.count)
        if not is_caught(result, cheat.caught_by) or result.honest != (cheat.caught_by == "truncation"):
            missed.append(name)
    assert (false_alarms, missed) == ([], [])
    assert len(CHEATS) == 17


def corpora(seed):
    """Corpora with documents of no and of one token, and one of a single document."""
    first, second, *others = cheats.documents(seed)
    return {"short": [first, [], second[:1], second, [], *others], "single": [first]}


@pytest.mark.parametrize("corpus", ["short", "single"])
@pytest.mark.usefixtures("no_processes")
def test_any_corpus_is_taken(monkeypatch, corpus):
    found = corpora(0)[corpus]
    monkeypatch.setattr(cheats, "documents", lambda seed: found)
    for name in HONEST:
        result = audit_of(name)
        assert result.honest, result.table()
        tried = {check.name for check in result.checks if check.verdict != "not tried"}
        assert {"coverage", "repeat", "suffix", "independence", "Kraft sum", "beat the truth"} <= tried
    missed = []
    for name, cheat in CHEATS.items():
        result = audit_of(name, 0, cheat.policy, cheat.count)
        if not is_caught(result, cheat.caught_by):
            missed.append(name)
    assert missed == []


@pytest.mark.parametrize("name", HONEST)
@pytest.mark.usefixtures("no_processes")
def test_honest_scorers_pass_where_segments_are_not_known(name):
    result = audit_of(name, segment=None)
    assert result.honest
    assert result.streamable
    assert {check.verdict for check in result.checks} <= {"passed", "reported", "not tried"}


@pytest.mark.parametrize("name", ["adapted", "warm-up on evaluation tokens"])
def test_a_fresh_process_is_tried(name):
    result = audit_of(name)
    assert result["repeat"].verdict == ("passed" if name in HONEST else "failed")
    assert result["repeat"].tried.endswith("in a fresh process")
    assert "not tried" in audit(cheats.make_scorer(name, 0), cheats.documents(0), vocabulary=VOCABULARY)["repeat"].note


@pytest.mark.usefixtures("no_processes")
def test_a_failure_says_where():
    result = audit_of("tail dropped")
    assert (result["coverage"].where.document, result["coverage"].where.token) == (0, 2 * SEGMENT)
    assert "at document 0, token 16; 16 nats for 21 tokens" in result.table()
    assert "not honest" in result.table()
    late = audit_of("previous document visible")["independence"].where
    assert late.token == 0
    json.dumps(result.as_dictionary(), allow_nan=False)


@pytest.mark.usefixtures("no_processes")
def test_a_kraft_sum_is_estimated_where_the_vocabulary_is_large():
    guess = lambda tokens: [1 / VOCABULARY] * VOCABULARY  # noqa: E731
    honest = audit_of("adapted", guess=guess, exact=4, samples=8)
    assert honest["Kraft sum"].verdict in ("passed", "undecided")
    assert "8 likely, 8 drawn" in honest["Kraft sum"].tried
    double = lambda documents: [[n - 2 for n in nats] for nats in cheats.make_scorer("adapted", 0)(documents)]  # noqa: E731
    found = audit(double, cheats.documents(0), vocabulary=VOCABULARY, guess=guess, exact=4, samples=8, segment=SEGMENT)
    assert found["Kraft sum"].verdict == "failed"


def test_rounding_that_learning_amplifies_is_reported_and_blames_nobody():
    def scorer(share):
        return lambda documents: [[2.0 * (1 + share * (len(tokens) > 30))] * len(tokens) for tokens in documents]

    long = [[1, 2] * 10, [3, 4] * 20]
    held, lost = (
        audit(scorer(0.0), cheats.documents(0), vocabulary=VOCABULARY, noisy=scorer(share), long=long)
        for share in (1e-6, 1e-2)
    )
    assert held["rounding"].deviation == pytest.approx(1e-6)
    assert (held["rounding"].verdict, held["rounding"].note) == ("reported", "digits hold: yes")
    assert lost["rounding"].deviation == pytest.approx(1e-2)
    assert lost["rounding"].note.startswith("digits hold: no")
    assert lost["rounding"].where.document == 1
    assert lost["rounding"].verdict == "reported"
    assert audit_of("static")["rounding"].verdict == "not tried"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"policy": "both"}, "policy must be document or stream, got both"),
        ({"documents": []}, r"documents must hold one of two tokens at least, got lengths \[\]"),
        ({"documents": [[], [1]]}, r"documents must hold one of two tokens at least, got lengths \[0, 1\]"),
        ({"vocabulary": 3}, "vocabulary must be above every token"),
    ],
)
def test_what_cannot_be_audited_is_said(changed, message):
    settings = {"documents": cheats.documents(0), "vocabulary": VOCABULARY} | changed
    with pytest.raises(ValueError, match=message):
        audit(HONEST["static"](0), **settings)


def test_a_scorer_must_score_every_document():
    with pytest.raises(ValueError, match="scorer must return nats for each of 3 documents, got 0"):
        audit(lambda documents: [], cheats.documents(0), vocabulary=VOCABULARY)


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A folder with a tiny model of ten letters and its tokenizer, and texts of them."""
    folder = tmp_path_factory.mktemp("letters")
    vocabulary = {letter: i for i, letter in enumerate(["<s>", "?", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="?").save_pretrained(
        folder / "model"
    )
    config = CONFIGS["llama"].__class__(**(CONFIGS["llama"].to_dict() | {"vocab_size": len(vocabulary)}))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    for i in range(3):
        (folder / f"{i}.txt").write_text("".join(LETTERS[int(x) % 10] for x in torch.randn(90).cumsum(0).mul(3)))
    return folder


def arguments(config, folder, *more):
    """The run of a YAML, small: a tiny model, short segments, text of ten letters."""
    short = {"segment": 8}
    if "TransformerXL" in config.read_text():
        short["memory"] = 12
    else:
        short["window"] = 20
    settings = {
        "model.pretrained": folder / "model",
        "data": json.dumps({"path": "text", "data_files": f"{folder}/*.txt", "split": "train"}),
        **{f"context.init_args.{name}": value for name, value in short.items()},
        "trainer.logger": "false",
        "trainer.accelerator": "cpu",
        "out": folder / "out" / config.stem,
    }
    if "teacher:" in config.read_text():
        settings["teacher.init_args.pretrained"] = folder / "model"
    if "blocks: [-6" in config.read_text():
        settings["parameters.init_args.blocks"] = "[-1, -1]"
    if "RMSDynamic" in config.read_text():
        statistics = {
            "data": {"path": "text", "data_files": f"{folder}/0.txt"},
            "file": f"{folder}/statistics.safetensors",
        }
        settings["update.init_args.statistics"] = json.dumps(statistics)
    given = [f"--{name}={value}" for name, value in settings.items()]
    return ["--config", str(config), *given, *more]


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(file, id=file.stem, marks=[] if file.stem in EVERY_WAY else [pytest.mark.exhaustive])
        for file in CONFIG_FILES
    ],
)
def test_every_configuration_is_honest(config, letters):
    assert_honest(arguments(config, letters))


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("--data.together", "3"),
        ("--reset.every", "never"),
        *(
            pytest.param(tuple(more.split()), marks=pytest.mark.exhaustive)
            for more in (
                "--data.together 3 --parameters.class_path LoRA --update AdamW --update.init_args.lr 0.01",
                "--data.together 2 --schedule.every 2",
                "--schedule.passes 3",
                "--update null",
                "--objective.class_path Anchored --objective.weight 0.5 --data.together 2",
                "--objective.class_path Replayed --objective.segments 2",
                "--objective.class_path Surprising --objective.threshold 2.0 --objective.of tokens",
                "--schedule.above_mean 0.98 --data.together 2",
                "--reset.every document --reset.keep 0.5",
                '--gradient [{"class_path":"Compressed","init_args":{"bits":2}},{"class_path":"Clip","init_args":{"norm":1.0}}]',
                "--context.refresh 1 --data.together 2",
                '--parameters {"class_path":"Pruned","init_args":{"of":{"class_path":"LoRA"},"keep":0.3,"every":2}}',
            )
        ),
    ],
    ids=" ".join,
)
def test_other_choices_are_honest(more, letters):
    config = next(file for file in CONFIG_FILES if file.stem == "quickstart")
    assert_honest(arguments(config, letters, *more))


def assert_honest(given):
    from dynlight.auditing import run_scorer as audit_run

    run = audit_run.AuditedRun(given)
    knowledge = run.knowledge()
    documents = knowledge["documents"][:2]
    result = audit(run.scorer, policy=run.policy, **(knowledge | {"make": None, "documents": documents}))
    assert result.honest, result.table()
    assert [check.name for check in result.checks if check.verdict in ("not tried", "undecided")] == []


@pytest.mark.slow
def test_the_command_line(letters, capsys):
    config = next(file for file in CONFIG_FILES if file.stem == "quickstart")
    assert main(arguments(config, letters)) == 0
    assert "honest: no check failed" in capsys.readouterr().out
    found = json.loads((letters / "out" / "quickstart-audit" / "audit.json").read_text())
    assert found["honest"] is True
    assert {check["verdict"] for check in found["checks"]} == {"passed", "reported"}
    # What carries over is honest as a stream, and not as documents.
    carried = ["--reset.every", "never", "--policy", "document", "--update.init_args.lr", "0.3"]
    assert main(arguments(config, letters, *carried)) == 1
    assert "independence" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--config", "absent.yaml"], "config must be a YAML file, got absent.yaml"),
        (["--receipt", "absent"], "receipt must be the folder of a run, got absent"),
        (["--documents", "0"], "receipt or decode must be given with documents"),
        (["--receipt"], "receipt must be given a value"),
        (["--policy", "both"], "policy must be document or stream, got both"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(given, message, capsys):
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_positions_lie_where_a_choosy_run_has_learned(letters):
    config = next(file for file in CONFIG_FILES if file.stem == "quickstart")
    run = AuditedRun(arguments(config, letters, "--data.together=3"))
    nats = run.scorer.read([_document(0, run._long_documents()[0], run.prefix)]).nats[0]
    means = [sum(nats[start : start + 8]) / 8 for start in range(0, len(nats) - 8, 8)]
    bound = sorted(means)[-2]  # which one segment is above, as the others are read before anything was learned
    run = AuditedRun(arguments(config, letters, f"--schedule.above={bound}"))
    learned = [i for i in range(100) if run._learns(i)]
    assert 0 < len(learned) < len(means)
    assert max(map(len, run.pieces())) > learned[0] * 8


@pytest.mark.parametrize("together", [1, 2])
def test_a_receipt_is_played_again(together, letters, capsys):
    from dynlight.running import fitting
    from dynlight.running.configuration import parse

    config = next(file for file in CONFIG_FILES if file.stem == "quickstart")
    folder = letters / f"played {together}"
    fitting.fit(parse(arguments(config, letters, f"--out={folder}", "--data.together", str(together))))
    assert main(["--receipt", str(folder)]) == 0
    assert "36 of 36 equal" in capsys.readouterr().out  # 3 documents of 90 tokens
    assert main(["--receipt", str(folder), "--documents", "1", "--segments", "0-1,3"]) == 0
    assert "segments played again   3" in capsys.readouterr().out
    receipt = json.loads((folder / "receipt.json").read_text())
    receipt["ledger"][3][3] -= 0.01
    (folder / "receipt.json").write_text(json.dumps(receipt))
    assert main(["--receipt", str(folder), "--documents", "0", "--segments", "3"]) == 1
    assert "row 3 of the ledger was changed" in capsys.readouterr().out


@pytest.mark.parametrize("scores", ["as they are", "twice too good"])
def test_the_rolling_log_likelihood_of_lm_eval_from_outside(scores, letters):
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is in the extra `test`")
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    window = 8
    model = AutoModelForCausalLM.from_pretrained(letters / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(letters / "model")
    harness = huggingface.HFLM(model, tokenizer=tokenizer, max_length=window, batch_size=64)

    def scorer(documents):
        """Each token of each of its windows as a request of its own: it returns sums over a request."""
        requests, owners = [], []
        for document, tokens in enumerate(documents):
            for part in get_rolling_token_windows(tokens, harness.prefix_token_id, window, 1):
                context, scored = make_disjoint_window(part)
                for i, token in enumerate(scored):
                    requests.append((None, [*context, *scored[:i]], [token]))
                    owners.append(document)
        found = harness._loglikelihood_tokens(requests, disable_tqdm=True)
        nats = [[] for _ in documents]
        for document, (likelihood, _) in zip(owners, found, strict=True):
            nats[document].append(-likelihood / (1 if scores == "as they are" else 2))
        return nats

    documents = [[2 + (i * i // 3 + k) % 10 for i in range(length)] for k, length in enumerate((19, 13))]
    result = audit(scorer, documents, vocabulary=len(tokenizer), segment=window)
    assert result.honest == (scores == "as they are")
    assert not result.streamable  # its last window ends with the document, and so begins earlier than it would
    if result.honest:
        request = type("Request", (), {"args": (tokenizer.decode(documents[0]).replace(" ", ""),)})
        (whole,) = harness.loglikelihood_rolling([request], disable_tqdm=True)
        assert sum(scorer(documents)[0]) == pytest.approx(-whole, rel=1e-5)
    else:
        assert result["Kraft sum"].verdict == "failed"
