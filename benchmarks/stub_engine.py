"""An engine that costs nothing: each step gives every request a token of a fixed text.

Speaks the engine process's side of the protocol; `python -m benchmarks.stub_engine DIRECTORY`.
Options: `step_s`, the least time between two steps.
"""

import sys
import time
from typing import Any

from jpaged.models.sources import DEFAULT_MODEL
from jpaged.sequence_end import Finish
from jpaged.serving import messages
from jpaged.serving.engine import EngineInfo
from jpaged.serving.engine_channel import Channel
from jpaged.serving.engine_process import end_with_parent
from jpaged.tokenizer import load_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 4


class StubEngine:
    """Runs all requests at once."""

    def __init__(self, channel: Channel, step_s: float) -> None:
        self._channel = channel
        self._step_s = step_s
        self._next_s = 0.0
        self._token_ids = load_tokenizer(DEFAULT_MODEL).encode(TEXT)
        # Handle to tokens given so far and tokens to give.
        self._running: dict[int, list[int]] = {}

    def serve(self) -> None:
        """Runs until it is told to stop."""
        while True:
            for message in self._channel.receive(wait=not self._running):
                match message:
                    case messages.Stop():
                        return
                    case messages.Add():
                        self._running[message.handle] = [0, message.params.get("max_tokens", 16)]
                    case messages.Abort(handle):
                        self._running.pop(handle, None)
                    case messages.Ask(call):
                        self._channel.send(messages.Answer(call, self._stats()))
            if self._running:
                self._step()

    def _step(self) -> None:
        wait_s = self._next_s - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)
        now = time.monotonic()
        self._next_s = max(self._next_s, now - self._step_s) + self._step_s
        handles = list(self._running)
        token_ids, ends, progress = [], {}, []
        for place, handle in enumerate(handles):
            state = self._running[handle]
            token_ids.append(self._token_ids[state[0] % len(self._token_ids)])
            if not state[0]:
                progress.append(messages.Progress(handle, now, now, 0, 0))
            state[0] += 1
            if state[0] >= state[1]:
                ends[place] = Finish("length")
                del self._running[handle]
        zeros = [0] * len(handles)
        self._channel.send(
            messages.StepTokens(handles, zeros, token_ids, {}, ends, progress, {}, {})
        )

    def _stats(self) -> dict[str, Any]:
        return {"scheduler": {"num_running": len(self._running), "num_waiting": 0}}


def main() -> None:
    end_with_parent()
    channel = Channel(sys.argv[1])
    (start,) = channel.receive(wait=True)
    assert isinstance(start, messages.Start)
    channel.send(messages.Connected())
    info = EngineInfo(
        model="stub",
        max_model_len=32768,
        max_num_seqs=1024,
        vocab_size=49152,
        max_logprobs=20,
        policy="fcfs",
        block_size=16,
        num_blocks=1 << 20,
        eos_token_ids=(2,),
    )
    channel.send(messages.Ready(info, DEFAULT_MODEL))
    StubEngine(channel, start.options["step_s"]).serve()
    channel.close()


if __name__ == "__main__":
    main()
