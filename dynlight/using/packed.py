"""Packed: a file as a `.dyn` file: its code, and in front of it all that is needed to read it back, but the model.

    DYN1 · length of the header, 2 bytes · header, deflated JSON · code, 32-bit words

| of the header | |
|---|---|
| `settings` | of the run, as in a YAML |
| `tokens` | how many the text has |
| `sha` | the first 16 digits of the file's SHA-256 |
| `model`, `tokenizer`, `teacher` | of theirs |
| `made` | versions and machine: a last bit that differs anywhere would make another text |
"""

import hashlib
import json
import platform
import re
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from dynlight.documents.document import tokenize
from dynlight.errors import SettingError, require
from dynlight.running.configuration import CHOICES, minimal
from dynlight.running.run import Run
from dynlight.using.coding import Watch, coder, decode, encode
from dynlight.using.files import as_bytes, as_text
from dynlight.using.reader import OF_TRAINER, Reader

MAGIC = b"DYN1"
_PATHS = ("pretrained", "tokenizer", "file", "data_dir")  # settings that may name what lies here
_DIGITS = 16  # of a SHA-256
# The settings of a run that decide what it predicts.
_SETTINGS = ("model", "teacher", *CHOICES, "trainer", "seed")
# What most headers hold, from which deflate takes it.
_USUAL = b"""{"settings":{"model":{"pretrained":"tiny-books"},"context":{"class_path":"dynlight.Overlapping","init_args":{"segment":
128,"window":"class_path":"dynlight.TransformerXL","init_args":{"segment":64,"memory":256,"sinks":0}},"parameters":{"class_path":
"dynlight.All"},{"class_path":"dynlight.LoRA","init_args":{"rank":8}},"dynlight.Matching","init_args":{"names":"mlp","blocks":[-2,
-1]}},"update":{"class_path":"torch.optim.SGD","torch.optim.AdamW","torch.optim.Adam","init_args":{"lr":0.002,"betas":[0.9,0.999],
"eps":1e-08,"weight_decay":0.0,"amsgrad":false,"maximize":false,"capturable":false,"differentiable":false,"decoupled_weight_decay"
:false}},"trainer":{"accelerator":"cpu"}},"mixture":{"rates":[0.001,0.01],"memories":[{"class_path":"dynlight.NGrams","init_args":{"order":6,"concentration":4.0}}],"made":["dynlight 0.1.0, torch 2.13.0, transformers 5.19.0, numpy 2., constriction 0.5.0
","x86_64 AVX2 AVX512 AMD EPYC Intel(R) Xeon(R) CPU",1],"model":"","sha":"","tokenizer":"","tokens":"""


@dataclass(frozen=True)
class Packed:
    """A compressed file, and what it came to.

    Sizes are in bytes; nats are those of the distributions that the code was made by.
    """

    bytes: bytes
    size: int  # of the file
    header: int
    code: int
    tokens: int
    nats: float
    static_nats: float | None  # by the initial weights, over the same windows


def pack(data: bytes, run: Run, watch: Watch | None = None) -> Packed:
    """Compresses a file by what a run's model predicts of it, learning as it reads.

    Raises:
        SettingError: if the tokenizer does not give a text back, or the model cannot be read token by token.
    """
    coder()  # or refused at once
    settings = _settings_of(run)
    foreign = _foreign(settings)
    require(not foreign, "model.trust_remote_code" if foreign == [True] else "class_path",
            "name what comes with dynlight or torch, as a compressed file would run other code", got=foreign[:1])  # fmt: skip
    require(not run.config.trainer.plugins, "trainer.plugins", "be left out of a compressed file", got="some")
    reader = Reader.of(run)
    text, tokenizer = as_text(data), run.tokenizer
    tokens, _ = tokenize(text, tokenizer)
    again = as_read(tokenizer, tokens.tolist())
    if again != text:
        place = next(
            (i for i, pair in enumerate(zip(again, text, strict=False)) if pair[0] != pair[1]),
            min(len(again), len(text)),
        )
        got = f"{again[place : place + 20]!r} for {text[place : place + 20]!r} at character {place}"
        raise SettingError(
            "model.tokenizer", "give a text back from its tokens", got=got, advice="choose a model with another"
        )
    code = encode(reader, tokens, watch)
    header = _packed_header(
        {
            "settings": settings,
            "made": _here(reader),
            "sha": _sha(data),
            "tokens": len(tokens),
            **{name: digits[:_DIGITS] for name, digits in reader.hashes().items()},
        }
    )
    require(len(header) < 1 << 16, "FILE.dyn", "have a header of less than 65,536 bytes", got=len(header),
            advice="shorten the settings")  # fmt: skip
    whole = MAGIC + len(header).to_bytes(2, "little") + header + code.bytes
    sizes = len(data), len(whole) - len(code.bytes), len(code.bytes)
    return Packed(whole, *sizes, len(tokens), code.nats, reader.so_far.static_nats)


def unpack(packed: bytes, watch: Watch | None = None, instead: Sequence[str] = ()) -> bytes:
    """The file that a `.dyn` file was made from, byte for byte.

    Args:
        packed: the file.
        watch: is told how far it is.
        instead: arguments of `dynlight.fit` that say where the model lies, in place of what the header says.

    Raises:
        SettingError: if it is damaged, or was made with another model, other versions or on another machine.
    """
    coder()
    header, code = _header_of(packed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(yaml.safe_dump(header["settings"] | {"data": {"path": "python-stdlib"}}), "utf-8")
        run = Run.of(["--config", str(path), *instead])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(header["made"][2])
        return _unpacked(header, code, Reader.of(run), watch)
    finally:
        torch.set_num_threads(threads)


def _unpacked(header: dict[str, Any], code: bytes, reader: Reader, watch: Watch | None) -> bytes:
    """What is in a file, by a reader of its settings, once all is as it was."""
    reader.make_ready()
    for name, got, was in zip(("versions", "machine"), _here(reader), header["made"], strict=False):
        require(got == was, name, f"be {was}, as where the file was compressed", got=got)
    for name, got in reader.hashes().items():
        must = f"be the one by which the file was compressed, of SHA-256 {header[name]}…"
        require(got.startswith(header[name]), _SETTING_OF[name], must, got=f"{got[:_DIGITS]}…")
    tokens = decode(reader, code, header["tokens"], watch)
    data = as_bytes(as_read(reader.module.tokenizer, tokens.tolist()))
    require(_sha(data) == header["sha"], "file", f"come out with the SHA-256 {header['sha']}… that it went in with",
            got=f"{_sha(data)}…", advice="it is damaged, this machine rounds otherwise, or statistics of RMSDynamic are others")  # fmt: skip
    return data


def as_read(tokenizer: Any, tokens: list[int]) -> str:
    """The text that tokens stand for, as it stands."""
    text: str = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _settings_of(run: Run) -> dict[str, Any]:
    """The settings that decide what a run predicts, without those that have their default."""
    settings: dict[str, Any] = _absolute(_filtered(minimal(run.config)))
    return settings


def _filtered(settings: dict[str, Any]) -> dict[str, Any]:
    """Of settings those that decide what a run predicts."""
    settings = {name: value for name, value in settings.items() if name in _SETTINGS}
    trainer = {name: value for name, value in settings.pop("trainer", {}).items() if name in OF_TRAINER}
    return settings | ({"trainer": trainer} if trainer else {})


def _foreign(value: Any) -> list[Any]:
    """What settings name of code that comes neither with dynlight nor with torch."""
    if isinstance(value, list):
        return [found for each in value for found in _foreign(each)]
    if not isinstance(value, dict):
        return []
    own = [
        path for path in (value.get("class_path"),) if path and not str(path).startswith(("dynlight.", "torch.optim."))
    ]
    return own + [True] * bool(value.get("trust_remote_code")) + _foreign(list(value.values()))


def _absolute(value: Any, name: str = "") -> Any:
    """Settings in which what lies in this folder is found from another, too."""
    if isinstance(value, dict):
        return {key: _absolute(each, key) for key, each in value.items()}
    if name == "data_files" and isinstance(value, list):
        return [_absolute(each, name) for each in value]
    is_here = name in (*_PATHS, "data_files") and isinstance(value, str) and not Path(value).is_absolute()
    return str(Path(value).absolute()) if is_here and (Path(value).exists() or "*" in value) else value


def _here(reader: Reader) -> list[Any]:
    """Versions, machine, and threads."""
    names = ("dynlight", "torch", "transformers", "numpy", "constriction")
    device = str(reader.device)
    kind = torch.cuda.get_device_name() if device.startswith("cuda") else _processor()
    return [", ".join(f"{name} {version(name)}" for name in names), f"{device} {kind}", torch.get_num_threads()]


def _processor() -> str:
    """The processor, as far as kernels are chosen by it."""
    told = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", told.read_text()) if told.is_file() else None
    return (
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {found[1] if found else platform.processor()}"
    )


_SETTING_OF = {"model": "model.pretrained", "tokenizer": "model.tokenizer", "teacher": "teacher.pretrained"}


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGITS]


def _packed_header(header: dict[str, Any]) -> bytes:
    packer = zlib.compressobj(9, wbits=-15, zdict=_USUAL)
    return packer.compress(json.dumps(header, separators=(",", ":")).encode()) + packer.flush()


def _header_of(packed: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a `.dyn` file, and the code behind it."""
    require(
        packed[:4] == MAGIC,
        "file",
        f"begin with {MAGIC.decode()}, as dynlight.compress leaves it",
        got=repr(packed[:4]),
    )
    stop = 6 + int.from_bytes(packed[4:6], "little")
    try:
        header = json.loads(zlib.decompressobj(wbits=-15, zdict=_USUAL).decompress(packed[6:stop]))
        versions, machine, threads = header["made"]
        assert (
            all(type(header[name]) is str for name in ("sha", "model", "tokenizer"))
            and type(header["tokens"]) is int
            and header["tokens"] >= 0
        )
        assert type(threads) is int and 0 < threads <= 1024 and type(versions) is type(machine) is str
        # A file of somebody else's may ask for what decides what is predicted alone, and for no code of its own.
        header["settings"] = _filtered(header["settings"])
        assert not _foreign(header["settings"]), "it names code that does not come with dynlight or torch"
        return header, packed[stop:]
    except (zlib.error, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise SettingError("file", "have a whole header", got=f"one that is damaged ({error!r})") from error
