"""The Python client of OpenAI."""

import asyncio
import threading
from typing import Literal

import openai
from common import KEY, NARROW_URL, URL, Flaky, full_server, picture, raises, run
from pydantic import BaseModel


def connect(url=URL, key=KEY, retries=0, kind=openai.OpenAI):
    return kind(base_url=f"{url}/v1", api_key=key, max_retries=retries, timeout=60)


client = connect()
HELLO = [{"role": "user", "content": "Hello"}]


def see(*urls):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, *parts]}]


SEEN = see(picture())


def ask(messages=HELLO, by=client, **options):
    return by.chat.completions.create(**{"model": "tiny", "messages": messages, "max_tokens": 8, **options})


def models():
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.owned_by == "idefics", model
    assert client.models.retrieve("tiny") == model
    assert raises(openai.NotFoundError, lambda: client.models.retrieve("gpt-4")).code == "model_not_found"


def chat():
    answer = ask(temperature=0)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason == "length"
    usage = answer.usage
    assert usage.completion_tokens == 8 and usage.total_tokens == usage.prompt_tokens + 8, usage
    assert answer._request_id.startswith("req-") and answer.id.startswith("chatcmpl-") and answer.model == "tiny"
    longer = ask(max_tokens=None, max_completion_tokens=12)
    assert longer.usage.completion_tokens == 12
    assert longer.choices[0].message.content.startswith(choice.message.content)


def stopping():
    text = ask().choices[0].message.content
    for stop in (text[3:5], ["never there", text[3:5]]):
        choice = ask(stop=stop).choices[0]
        assert choice.finish_reason == "stop" and choice.message.content == text[: text.index(text[3:5])], choice


def streaming_with_usage():
    whole = ask(SEEN)
    text, usage, reasons, roles = "", None, [], []
    for chunk in ask(SEEN, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert text == whole.choices[0].message.content, (text, whole)
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens
    assert (roles, reasons) == (["assistant"], ["length"])
    assert all(chunk.usage is None for chunk in ask(stream=True)), "usage that nobody asked for"


def streaming_helper():
    text = ask().choices[0].message.content
    stop = text[3:5]
    options = {"model": "tiny", "messages": HELLO, "max_tokens": 8}
    with client.chat.completions.stream(**options, stop=stop) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert final.choices[0].message.content == deltas == text[: text.index(stop)]
    assert final.choices[0].finish_reason == "stop"
    with client.chat.completions.stream(**options) as stream:
        stream.until_done()
        # This helper takes an answer that was cut off for an error, whoever wrote it.
        cut = raises(openai.LengthFinishReasonError, stream.get_final_completion)
    assert cut.completion.choices[0].message.content == text


def pictures():
    one = ask(SEEN).usage
    two = ask(see(picture(), picture())).usage
    assert one.prompt_tokens_details.model_extra["image_tokens"] == 3
    assert two.prompt_tokens_details.model_extra["image_tokens"] == 5, "the token between two is theirs together"
    blind = ask([{"role": "user", "content": "What is this?"}])
    assert blind.choices[0].message.content != ask(SEEN).choices[0].message.content, "the picture is seen"
    assert one.prompt_tokens > blind.usage.prompt_tokens


def a_second_question_is_cheaper():
    first = ask(SEEN)
    said = [*SEEN, {"role": "assistant", "content": first.choices[0].message.content}]
    second = ask([*said, {"role": "user", "content": "Sure?"}])
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 1, second.usage


def log_probabilities_and_choices():
    answer = ask(n=2, temperature=1, seed=1, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].message.content != answer.choices[1].message.content
    for choice in answer.choices:
        assert len(choice.logprobs.content) == 8
        for token in choice.logprobs.content:
            assert token.logprob <= 0 and len(token.top_logprobs) == 2
            assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
    again = ask(n=2, temperature=1, seed=1)
    assert [it.message.content for it in again.choices] == [it.message.content for it in answer.choices]


def answers_of_a_form():
    class Verdict(BaseModel):
        answer: Literal["yes", "no"]

    answer = client.chat.completions.parse(model="tiny", messages=HELLO, max_tokens=100, response_format=Verdict)
    assert answer.choices[0].message.parsed.answer in ("yes", "no")


def completions():
    answer = client.completions.create(model="tiny", prompt=["Hello", "You"], max_tokens=4, logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [len(choice.logprobs.tokens) for choice in answer.choices] == [4, 4]
    assert answer.usage.completion_tokens == 8
    chunks = list(client.completions.create(model="tiny", prompt="Hello", max_tokens=4, stream=True))
    assert len(chunks) > 1
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def errors():
    def expect(error, status, messages=HELLO, **change):
        raised = raises(error, lambda: ask(messages, **change))
        assert raised.status_code == status and raised.request_id.startswith("req-"), raised
        return raised

    bad = expect(openai.BadRequestError, 400, temperature=9)
    assert bad.param == "temperature" and bad.type == "invalid_request_error", bad.body
    assert expect(openai.BadRequestError, 400, temperature=9, stream=True).param == "temperature"
    assert expect(openai.NotFoundError, 404, model="gpt-4").code == "model_not_found"
    long = [{"role": "user", "content": "word " * 500}]
    assert expect(openai.BadRequestError, 400, long).code == "context_length_exceeded"
    remote = see("https://pictures.example/cat.jpg")
    assert expect(openai.BadRequestError, 400, remote).code == "remote_images_disabled"
    assert expect(openai.BadRequestError, 400, see("file:///etc/passwd")).code == "invalid_image_url"
    assert expect(openai.APIStatusError, 413, see(*[picture()] * 17)).code == "too_many_images"
    assert expect(openai.APIStatusError, 415, see("data:image/png;base64,AA==")).code == "unsupported_image"
    assert expect(openai.UnprocessableEntityError, 422, see(picture(0.2))).code == "invalid_image"


def keys():
    for key in ("wrong-key", KEY[:-1], KEY + "x", KEY.upper()):
        error = raises(openai.AuthenticationError, connect(key=key).models.list)
        assert error.status_code == 401 and error.type == "authentication_error", error
        raises(openai.AuthenticationError, lambda: ask(by=connect(key=key), stream=True))


def retries():
    flaky = Flaky(failures=2)
    answer = ask(by=connect(flaky.url, retries=2))
    assert answer.choices[0].message.content == ask().choices[0].message.content and flaky.requests == 3
    flaky = Flaky(failures=2)
    raises(openai.InternalServerError, lambda: ask(by=connect(flaky.url, retries=1)))
    assert flaky.requests == 2


def a_full_server():
    with full_server() as leave:
        error = raises(openai.RateLimitError, lambda: ask(by=connect(NARROW_URL)))
        assert error.code == "queue_full" and int(error.response.headers["retry-after"]) >= 1, error
        threading.Timer(0.3, leave).start()
        patient = connect(NARROW_URL, retries=8).chat.completions.with_raw_response
        reply = patient.create(model="tiny", messages=HELLO, max_tokens=2)
    assert reply.retries_taken >= 1 and reply.parse().usage.completion_tokens == 2


def asynchronous():
    async def work():
        async with connect(kind=openai.AsyncOpenAI) as client:

            async def streamed():
                chunks = await ask(by=client, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            async def whole():
                return (await ask(by=client)).choices[0].message.content

            return await asyncio.gather(*[streamed() if i % 2 else whole() for i in range(8)])

    assert set(asyncio.run(work())) == {ask().choices[0].message.content}


run(
    [
        models,
        chat,
        stopping,
        streaming_with_usage,
        streaming_helper,
        pictures,
        a_second_question_is_cheaper,
        log_probabilities_and_choices,
        answers_of_a_form,
        completions,
        errors,
        keys,
        retries,
        a_full_server,
        asynchronous,
    ]
)
