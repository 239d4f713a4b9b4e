"""Server-sent events, as a client reads them."""

import codecs


class EventParser:
    """Takes a stream of bytes piece by piece and gives the data of each complete event."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._rest = ""
        self._data: list[str] = []

    def push(self, piece: bytes) -> list[str]:
        """The data of the events that this piece completes; other fields are skipped."""
        self._rest += self._decoder.decode(piece)
        *lines, self._rest = self._rest.split("\n")
        events = []
        for line in lines:
            line = line.removesuffix("\r")
            if line.startswith("data:"):
                self._data.append(line[5:].removeprefix(" "))
            elif not line and self._data:
                events.append("\n".join(self._data))
                self._data.clear()
        return events
