"""Output whose reader is gone."""

import os

from flowalign.commands.output import IgnoresBrokenPipe


def test_a_reader_of_the_output_may_exit_first() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", buffering=1) as stream:
        output = IgnoresBrokenPipe(stream)
        output.write("a line\n")
        os.close(reader)  # `| tee log` on Ctrl-C
        for text in ("stopping\n", "no newline"):
            output.write(text)
            output.flush()
        assert output.fileno() == writer
        assert (output.encoding, output.isatty(), output.closed) == (stream.encoding, False, False)
