"""`tail -f app.log | python -m dynlight.watch --config configs/log.yaml`: the lines that surprise a model that reads along."""

import heapq
import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynlight.arguments import asks_for_help, number_of, own_options, refused
from dynlight.errors import SettingError, require

if TYPE_CHECKING:
    from dynlight.recording.signals import Signals
    from dynlight.using.lines import Line, Surprising
    from dynlight.using.reader import Reader

HELP = """usage: tail -f FILE | python -m dynlight.watch --config X.yaml [--section.key value ...]

Reads lines as they come, each scored and then learned from, and prints those that
surprise more than most of the lines before: in bits per byte, by the weights that have
learned so far and by the initial ones. At its end it prints the most surprising ones.
The first 50 lines are for learning alone.

  --config X.yaml   a run, and overrides, as for dynlight.fit; its data, out, keep,
                    loggers and callbacks are not used
  --share S         how much of the last 200 lines may have surprised more than one that
                    is printed (default: 0.02)
  --wait S          seconds after which lines are read that fill no segment (default: 2)
  --state folder    goes on with what the last watch has learned, and leaves it there
  --help            prints this

exit status: 0 all was read, 2 couldn't be run, 128 + n stopped by signal n
"""
_MOST = 4096  # bytes that are read at once
_TOLD = 10  # of the most surprising lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Watches standard input; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if asks_for_help(arguments):
        print(HELP, end="")
        return 0
    from dynlight.recording.signals import Signals
    from dynlight.running.run import Run
    from dynlight.running.trainer import quiet
    from dynlight.using.lines import Surprising
    from dynlight.using.reader import Reader
    from dynlight.using.saved import STATE

    quiet()
    try:
        options, rest = own_options(arguments, ("share", "wait", "state"))
        share, wait = number_of(options, "share", 0.02, 1e-6, 1), number_of(options, "wait", 2.0, 1e-3, 3600)
        require(sys.stdin is not None, "standard input", "be a pipe or a file", got="nothing")
        reader = Reader.of(Run.of(rest))
        reader.check_any_length()
        state = Path(options["state"]) if "state" in options else None
        if state is not None:
            state.mkdir(parents=True, exist_ok=True)
            if (state / STATE).exists():
                reader.load(state)
        with Signals() as signals:
            status = _watch(reader, Surprising(share), wait, signals)
        if state is not None:
            reader.save(state)
        return status
    except (OSError, SettingError) as error:
        return refused(error)


def _watch(reader: "Reader", surprising: "Surprising", wait: float, signals: "Signals") -> int:
    """Reads to the end of the input, or until a signal, which waits for the present read; prints on the way."""
    from dynlight.recording.report.ratios import bits_per_byte
    from dynlight.recording.report.terminal import show
    from dynlight.recording.report.text import number
    from dynlight.recording.signals import Interrupted
    from dynlight.using.files import as_text
    from dynlight.using.lines import lines_of

    show("     line  adapted  static  bits per byte")
    most: list[tuple[float, int, Line]] = []  # the least of them first
    lines, size, status, wrong = 0, 0, 0, None
    before = reader.so_far.nats, reader.so_far.static_nats, len(reader)
    try:
        for data in _blocks(sys.stdin.fileno(), wait, lambda data: reader.fills(as_text(data))):
            text = as_text(data)
            signals.waits = True
            table = reader.read(text)
            size += len(data)
            for line in lines_of(text, table, lines + 1):
                lines = line.number
                if not surprising.is_ready:
                    surprising.sees(line)
                    continue
                if surprising.sees(line):
                    show(_shown(line))
                heapq.heappush(most, (line.surprise, -line.number, line))
                if len(most) > _TOLD:
                    heapq.heappop(most)
            signals.waits = False
            if signals.received is not None:
                raise signals.received
    except Interrupted as stop:
        status = 128 + stop.signum
    except SettingError as error:
        status, wrong = 2, error
    own, static = reader.so_far.nats - before[0], reader.so_far.static_nats
    static = None if static is None or before[1] is None else static - before[1]
    scores = f"{number(bits_per_byte(static, size))} → {number(bits_per_byte(own, size))} bits per byte"
    show(f"\n{lines:,} line{'s' * (lines != 1)}, {len(reader) - before[2]:,} tokens: {scores}")
    if most:
        show("the most surprising:\n" + "\n".join(_shown(line) for _, _, line in sorted(most, reverse=True)))
    if wrong is not None:
        raise wrong
    if reader.has_failed:
        show("warning: read by the initial weights from where numbers went wrong; lower update.lr or set clip")
    return status


def _blocks(descriptor: int, wait: float, fills: Callable[[bytes], bool]) -> Iterator[bytes]:
    """Whole lines of an input, as soon as they fill a segment, or nothing has come for a while; at its end what is left."""
    kept = b""
    while True:
        is_quiet = not select.select([descriptor], [], [], wait if kept else None)[0]
        more = b"" if is_quiet else os.read(descriptor, 1 << 16)
        has_ended = not is_quiet and not more
        kept += more
        if len(kept) > 16 * _MOST and b"\n" not in kept:  # no lines at all
            yield kept
            kept = b""
        while len(kept) > _MOST and b"\n" in kept:  # of a file that is there already; what is found is told on the way
            stop = (kept.rfind(b"\n", 0, _MOST) + 1) or (kept.find(b"\n") + 1)
            yield kept[:stop]
            kept = kept[stop:]
        stop = len(kept) if has_ended else kept.rfind(b"\n") + 1
        if stop and (has_ended or is_quiet or fills(kept[:stop])):
            yield kept[:stop]
            kept = kept[stop:]
        if has_ended:
            return


def _shown(line: "Line") -> str:
    from dynlight.recording.report.ratios import bits_per_byte
    from dynlight.recording.report.text import number, visible

    static = number(bits_per_byte(line.static_nats, line.bytes), 2)
    return f"{line.number:9,}  {line.surprise:7.2f}  {static:>6}  {visible(line.text)}"


if __name__ == "__main__":
    sys.exit(main())
