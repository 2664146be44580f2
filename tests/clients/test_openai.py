"""The Python client of OpenAI."""

import asyncio

import openai
from common import KEY, URL, Flaky, picture, run

client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
HELLO = [{"role": "user", "content": "Hello"}]
SEEN = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is this?"},
            {"type": "image_url", "image_url": {"url": picture()}},
        ],
    }
]


def model():
    return client.models.list().data[0].id


def models():
    assert client.models.retrieve(model()).object == "model"


def chat():
    answer = client.chat.completions.create(model=model(), messages=HELLO, max_tokens=8, temperature=0)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id.startswith("req-")


def streaming_with_usage():
    whole = client.chat.completions.create(model=model(), messages=SEEN, max_tokens=8)
    stream = client.chat.completions.create(
        model=model(), messages=SEEN, max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    text, usage, reasons = "", None, []
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert text == whole.choices[0].message.content, (text, whole)
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert reasons == [whole.choices[0].finish_reason]


def streaming_helper():
    with client.chat.completions.stream(model=model(), messages=HELLO, max_tokens=8) as stream:
        stream.until_done()
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason in ("stop", "length")


def pictures():
    answer = client.chat.completions.create(model=model(), messages=SEEN, max_tokens=4)
    assert answer.usage.prompt_tokens_details.model_extra["image_tokens"] == 3


def log_probabilities_and_choices():
    answer = client.chat.completions.create(
        model=model(), messages=HELLO, max_tokens=4, n=2, temperature=1, seed=1, logprobs=True, top_logprobs=2
    )
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert len(choice.logprobs.content[0].top_logprobs) == 2


def completions():
    answer = client.completions.create(model=model(), prompt=["Hello", "You"], max_tokens=4, logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.completion_tokens / 2
    chunks = list(client.completions.create(model=model(), prompt="Hello", max_tokens=4, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def errors():
    def expect(error, **change):
        request = {"model": model(), "messages": HELLO, "max_tokens": 4, **change}
        try:
            client.chat.completions.create(**request)
        except error as raised:
            return raised
        raise AssertionError(f"{change} passed")

    bad = expect(openai.BadRequestError, temperature=9)
    assert bad.param == "temperature" and bad.type == "invalid_request_error", bad.body
    assert expect(openai.NotFoundError, model="gpt-4").code == "model_not_found"
    long = [{"role": "user", "content": "word " * 500}]
    assert expect(openai.BadRequestError, messages=long).code == "context_length_exceeded"
    broken = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}]
    expect(openai.APIStatusError, messages=broken)
    expect(openai.BadRequestError, temperature=9, stream=True)
    stranger = openai.OpenAI(base_url=f"{URL}/v1", api_key="wrong-key", max_retries=0)
    try:
        stranger.models.list()
        raise AssertionError("a wrong key passed")
    except openai.AuthenticationError:
        pass


def retries():
    flaky = Flaky(failures=2)
    patient = openai.OpenAI(base_url=f"{flaky.url}/v1", api_key=KEY, max_retries=2)
    answer = patient.chat.completions.create(model="default", messages=HELLO, max_tokens=2)
    assert answer.usage.completion_tokens <= 2 and flaky.requests == 3


def asynchronous():
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0) as client:
            asks = [client.chat.completions.create(model="default", messages=HELLO, max_tokens=4) for _ in range(8)]
            return await asyncio.gather(*asks)

    texts = {answer.choices[0].message.content for answer in asyncio.run(ask())}
    assert len(texts) == 1, texts


run(
    [
        models,
        chat,
        streaming_with_usage,
        streaming_helper,
        pictures,
        log_probabilities_and_choices,
        completions,
        errors,
        retries,
        asynchronous,
    ]
)
