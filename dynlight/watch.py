"""`tail -f app.log | python -m dynlight.watch --config configs/log.yaml`: the lines that surprise a model that reads along."""

import heapq
import os
import select
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from dynlight.errors import SettingError

HELP = """usage: tail -f FILE | python -m dynlight.watch --config X.yaml [--section.key value ...]

Reads lines as they come, each scored and then learned from, and prints those that
surprise more than most of the lines before: in bits per byte, by the weights that have
learned so far and by the initial ones. At its end it prints the most surprising ones.

  --config X.yaml   a run, and overrides, as for dynlight.fit; its data, out and loggers
                    are not used
  --share S         how much of the last 200 lines may have surprised more than one that
                    is printed (default: 0.02)
  --wait S          seconds after which lines are read that fill no segment (default: 2)
  --help            prints this

exit status: 0 all was read, 2 couldn't be run, 130 stopped by Ctrl-C
"""


_MOST = 4096  # bytes that are read at once


def main(arguments: Sequence[str] | None = None) -> int:
    """Watches standard input; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(HELP, end="")
        return 0
    from dynlight.running.run import Run
    from dynlight.running.trainer import quiet
    from dynlight.using.lines import Surprising
    from dynlight.using.reader import Reader

    quiet()
    try:
        options, rest = _own_options(arguments)
        surprising = Surprising(options["share"])
        reader = Reader.of(Run.of(rest))
        reader.make_ready()
        return _watch(reader, surprising, options["wait"])
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _watch(reader: Any, surprising: Any, wait: float) -> int:
    """Reads to the end of the input, and prints on the way."""
    from dynlight.using.lines import lines_of

    print("     line  adapted  static  bits per byte", flush=True)
    most: list[tuple[float, int, str]] = []
    count, status = 0, 0
    try:
        for text in _texts(sys.stdin.fileno(), wait, reader.fills):
            for line in lines_of(text, reader.read(text), count + 1):
                count = line.number
                if surprising.sees(line):
                    print(_shown(line), flush=True)
                heapq.heappush(most, (line.surprise, -line.number, _shown(line)))
                if len(most) > 10:
                    heapq.heappop(most)
    except (KeyboardInterrupt, SystemExit):  # Lightning makes one of the other
        status = 130
    so_far = reader.so_far
    from dynlight.recording.report.ratios import bits_per_byte
    from dynlight.recording.report.text import number

    static, own = (number(bits_per_byte(nats, so_far.bytes)) for nats in (so_far.static_nats, so_far.nats))
    print(f"\n{count:,} lines, {so_far.tokens:,} tokens: {static} → {own} bits per byte; of all, the most surprising:")
    print("\n".join(shown for _, _, shown in sorted(most, reverse=True)))
    return status


def _texts(descriptor: int, wait: float, fills: Any) -> Iterator[str]:
    """Whole lines of an input, as soon as they fill a segment, or nothing has come for a while; at its end what is left."""
    kept = b""
    while True:
        is_quiet = not select.select([descriptor], [], [], wait if kept else None)[0]
        more = b"" if is_quiet else os.read(descriptor, 1 << 16)
        has_ended = not is_quiet and not more
        kept += more
        while len(kept) > _MOST and b"\n" in kept:  # a file that is there already: what is found is told on the way
            stop = (kept.rfind(b"\n", 0, _MOST) + 1) or (kept.find(b"\n") + 1)
            yield kept[:stop].decode(errors="replace")
            kept = kept[stop:]
        stop = len(kept) if has_ended else kept.rfind(b"\n") + 1
        if stop and (has_ended or is_quiet or fills(kept[:stop].decode(errors="replace"))):
            yield kept[:stop].decode(errors="replace")
            kept = kept[stop:]
        if has_ended:
            return


def _shown(line: Any) -> str:
    from dynlight.recording.report.ratios import bits_per_byte
    from dynlight.recording.report.text import number, visible

    static = number(bits_per_byte(line.static_nats, line.bytes), 2)
    return f"{line.number:9,}  {line.surprise:7.2f}  {static:>6}  {visible(line.text)}"


def _own_options(arguments: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """The command's own options, and the arguments that are left, which describe a run."""
    options, rest = {"share": 0.02, "wait": 2.0}, list[str]()
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name in options:
            given = value if equals else next(waiting, "nothing")
            try:
                options[name] = float(given)
            except ValueError:
                raise SettingError(name, "be a number", got=given) from None
        else:
            rest.append(argument)
    for name, most in (("share", 1.0), ("wait", 3600.0)):
        if not 0 < options[name] <= most:
            raise SettingError(name, f"be above 0 and at most {most:g}", got=options[name])
    return options, rest


if __name__ == "__main__":
    sys.exit(main())
