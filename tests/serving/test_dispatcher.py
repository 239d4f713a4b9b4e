import asyncio

import pytest

from jpaged import SamplingParams
from jpaged.request import Request
from jpaged.serving import messages
from jpaged.serving.admission import AdmissionQueue
from jpaged.serving.dispatcher import Dispatcher
from jpaged.serving.engine import EngineInfo
from jpaged.serving.mirror import Mirror
from jpaged.serving.stream import Stream

INFO = EngineInfo(
    model="tiny",
    max_model_len=64,
    max_num_seqs=4,
    vocab_size=96,
    max_logprobs=5,
    policy="priority",
    block_size=8,
    num_blocks=16,
)


def _put(dispatcher, *, priority=0):
    params = SamplingParams(max_tokens=4)
    request = Request("one", [1, 2, 3], params, priority=priority)
    stream = Stream()
    dispatcher.put(stream, Mirror(request, params, None), None)
    return stream


def test_a_request_that_no_message_can_carry_fails_alone():
    async def run():
        sent = []
        dispatcher = Dispatcher(AdmissionQueue(), lambda m: sent.append(messages.encode(m)), INFO)
        bad = _put(dispatcher, priority=1 << 70)
        with pytest.raises(ValueError, match="the request cannot be sent to the engine: "):
            await asyncio.wait_for(bad.get(), 10)
        assert (dispatcher.num_running_seqs, dispatcher.running, sent) == (0, {}, [])
        _put(dispatcher)
        assert (dispatcher.num_running_seqs, len(sent)) == (1, 1)

    asyncio.run(run())
