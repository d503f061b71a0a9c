"""A score is honest if a text comes back from its code, and the code is as short as the score."""

import pytest
import yaml
from folders import configuration

from dynlight.audit import main as audit_main
from dynlight.learning.weights import InPlace


def decoded(tmp_path, library, *arguments, **changes):
    settings = configuration(library / "model", f"{library}/documents/*.txt", tmp_path / "out") | changes
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return audit_main(["--decode", "--config", str(tmp_path / "run.yaml"), *arguments])


def test_an_honest_score_can_be_decoded(tmp_path, library, capsys):
    assert decoded(tmp_path, library, "--tokens", "40") == 0
    head, *lines, verdict = capsys.readouterr().out.splitlines()
    assert head.split() == ["document", "tokens", "scored", "coded", "came", "out"]
    assert [line.split()[:2] for line in lines] == [["a.txt", "40"], ["b.txt", "40"]]
    assert all(line.endswith("as it went in") for line in lines)
    assert verdict == "the score can be decoded"


def test_a_score_that_has_seen_its_tokens_has_no_code_as_short(tmp_path, library, capsys, monkeypatch):
    score = InPlace.score

    def sees(self, segment, *others, **settings):
        """Knows the tokens, where there is more than one."""
        reading = score(self, segment, *others, **settings)
        return reading._replace(nats=reading.nats * 0.1) if segment.targets.shape[1] > 1 else reading

    monkeypatch.setattr(InPlace, "score", sees)
    assert decoded(tmp_path, library, "--documents", "1") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("b.txt") and "of a code that is longer than the score" in lines[1]
    assert lines[-1] == "the score can't be decoded"


def test_a_decoder_that_learns_otherwise_is_found(tmp_path, library, capsys, monkeypatch):
    step, count = InPlace.step, [0]

    def changes(self, *arguments):
        step(self, *arguments)
        count[0] += 1
        for weight in self.learned:
            weight.data.mul_(1 + 1e-2 * count[0])  # at no two times the same

    monkeypatch.setattr(InPlace, "step", changes)
    assert decoded(tmp_path, library, "--documents", "0") == 1
    assert "otherwise, from token " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (["--tokens", "0"], {}, "tokens must be at least 1, got 0"),
        (["--documents", "7"], {}, "documents must name documents of the run, got 7"),
        (["--segments", "0"], {}, "segments must be left out with decode, got 0"),
        ([], {"reset": {"every": "never"}}, "reset.every must be document with decode"),
        ([], {"model": {"pretrained": "tiny-books", "compile": True}}, "model.compile must be false"),
    ],
)
def test_what_cannot_be_decoded_is_told(tmp_path, library, capsys, arguments, changes, message):
    assert decoded(tmp_path, library, *arguments, **changes) == 2
    assert message in capsys.readouterr().err


def test_tokens_are_of_decode_alone(capsys):
    assert audit_main(["--config", "x.yaml", "--tokens", "3"]) == 2
    assert "decode must be given with tokens, got nothing" in capsys.readouterr().err
