"""One chat request, checked and ready to run."""

import dataclasses

from jpaged.outputs import CompletionOutput
from jpaged.serving.answers import ChatLogprobs
from jpaged.serving.generation import Generation
from jpaged.serving.logprobs import chat_logprobs
from jpaged.serving.protocol_chat import ChatCompletionRequest
from jpaged.serving.tool_choice import ToolPlan


@dataclasses.dataclass(slots=True)
class ChatRun:
    """What the answer is made with.

    Attributes:
        body: What was asked.
        answer_id: Of the answer.
        model: Its name in the answer.
        role: Of the answer's messages.
        plan: What happens with tools.
        num_top: Most likely tokens that log-probabilities show; None for no log-probabilities.
        as_token_ids: Whether tokens are shown by their ids.
        generation: Runs it.
    """

    body: ChatCompletionRequest
    answer_id: str
    model: str
    role: str
    plan: ToolPlan
    num_top: int | None
    as_token_ids: bool
    generation: Generation

    def logprobs(self, part: CompletionOutput) -> ChatLogprobs | None:
        """Those of a continuation, or of what is new of it."""
        if self.num_top is None:
            return None
        return chat_logprobs(
            part.token_ids,
            part.logprobs or (),
            num_top=self.num_top,
            as_token_ids=self.as_token_ids,
        )
