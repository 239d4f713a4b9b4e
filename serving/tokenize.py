"""POST /tokenize and POST /detokenize: the model's tokenizer by itself."""

from starlette.requests import Request
from starlette.responses import Response

from jpaged.serving.answers import Detokenization, Tokenization
from jpaged.serving.chat_messages import read_messages
from jpaged.serving.errors import bad_request
from jpaged.serving.prompt_reader import off_loop
from jpaged.serving.protocol_chat import DetokenizeRequest, TemplateOptions, TokenizeRequest
from jpaged.serving.request_body import read_body
from jpaged.serving.responses import json_response
from jpaged.serving.service import Service


class Tokenize:
    """The handlers of both routes."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def tokenize(self, request: Request) -> Response:
        """The tokens of a prompt, or of a conversation as the chat route would see it."""
        service = self._service
        body = await read_body(request, TokenizeRequest, service.settings)
        service.model_name(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("either prompt or messages must be given", "prompt")
        if body.messages is None:
            for name in TemplateOptions.model_fields:
                if getattr(body, name) is not None:
                    raise bad_request(f"{name} needs messages", name)
        is_text = body.messages is None
        text = body.prompt or ""
        if body.messages is not None:
            text = await read_messages(service, body.messages, body, body.tools)
        special = is_text if body.add_special_tokens is None else body.add_special_tokens
        tokens = await service.reader.encode(
            text, add_special_tokens=special, field="prompt" if is_text else "messages"
        )
        answer = Tokenization(len(tokens), service.engine.info.max_model_len, tokens)
        if body.return_token_strs:
            backend = service.reader.tokenizer.backend
            answer.token_strs = [backend.id_to_token(token) or "" for token in tokens]
        return json_response(answer)

    async def detokenize(self, request: Request) -> Response:
        """The text of tokens."""
        service = self._service
        body = await read_body(request, DetokenizeRequest, service.settings)
        service.model_name(body.model)
        limit = service.engine.info.vocab_size
        outside = next((token for token in body.tokens if not 0 <= token < limit), None)
        if outside is not None:
            raise bad_request(f"tokens must be in [0, {limit - 1}], got {outside}", "tokens")
        tokenizer = service.reader.tokenizer
        text = await off_loop(
            len(body.tokens), lambda: tokenizer.decode(body.tokens, skip_special_tokens=False)
        )
        return json_response(Detokenization(text))
