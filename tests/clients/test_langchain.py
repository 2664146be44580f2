"""ChatOpenAI of LangChain."""

from typing import Literal

import openai
from common import KEY, NARROW_URL, URL, Flaky, full_server, picture, raises, run
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

OPTIONS = {"model": "default", "base_url": f"{URL}/v1", "api_key": KEY, "max_tokens": 6, "max_retries": 0, "timeout": 60}
chat_model = ChatOpenAI(**OPTIONS)
WHO = {"type": "text", "text": "Who?"}


def look(url):
    return HumanMessage([{"type": "image_url", "image_url": {"url": url}}, WHO])


SEEN = [SystemMessage("Be brief."), look(picture()), AIMessage("A cat."), HumanMessage("Sure?")]


def chat():
    answer = chat_model.invoke(SEEN)
    assert answer.content
    usage = answer.usage_metadata
    assert usage["output_tokens"] == 6 and usage["total_tokens"] == usage["input_tokens"] + 6, usage
    assert answer.response_metadata["finish_reason"] == "length"
    assert answer.response_metadata["model_name"] == "tiny"
    assert answer.content != chat_model.invoke(SEEN[:1] + SEEN[2:]).content, "the picture is seen"


def blocks_of_other_dialects():
    data = picture().split(",", 1)[1]
    expected = chat_model.invoke([HumanMessage([WHO, look(picture()).content[0]])])
    for block in (
        {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": data}},
        {"type": "image", "base64": data, "mime_type": "image/jpeg"},
    ):
        answer = chat_model.invoke([HumanMessage([WHO, block])])
        assert (answer.content, answer.usage_metadata["input_tokens"]) == (
            expected.content,
            expected.usage_metadata["input_tokens"],
        )


def streaming():
    whole = chat_model.invoke(SEEN)
    joined, count = None, 0
    for chunk in ChatOpenAI(**OPTIONS, stream_usage=True).stream(SEEN):
        joined = chunk if joined is None else joined + chunk
        count += bool(chunk.content)
    assert joined.content == whole.content and count > 1
    assert joined.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"]
    assert joined.response_metadata["finish_reason"] == "length"


def batches():
    answers = chat_model.batch([SEEN, ["Hello"]] * 4)
    for answer, alone in zip(answers, [chat_model.invoke(SEEN), chat_model.invoke("Hello")] * 4):
        assert answer.content == alone.content


def structured_output():
    class Verdict(BaseModel):
        """Whether it is so."""

        answer: Literal["yes", "no"]

    model = ChatOpenAI(**{**OPTIONS, "max_tokens": 100}).with_structured_output(Verdict, method="json_schema")
    assert model.invoke("Hello").answer in ("yes", "no")


def completions():
    # Its own default is a draw.
    model = OpenAI(**OPTIONS, temperature=0)
    text = model.invoke("Hello")
    assert text and "".join(model.stream("Hello")) == text


def errors():
    bad = ChatOpenAI(**OPTIONS, temperature=1.9, top_p=7)
    assert raises(openai.BadRequestError, lambda: bad.invoke(SEEN)).param == "top_p"
    assert raises(openai.BadRequestError, lambda: list(bad.stream(SEEN))).param == "top_p"
    for status, url in ((400, "https://pictures.example/a.jpg"), (415, "data:image/png;base64,AA=="), (422, picture(0.2))):
        assert raises(openai.APIStatusError, lambda: chat_model.invoke([look(url)])).status_code == status
    # An error of LangChain's own, made from the server's code.
    error = raises(openai.BadRequestError, lambda: chat_model.invoke("word " * 500))
    assert "context" in str(error), error


def keys():
    stranger = ChatOpenAI(**{**OPTIONS, "api_key": "wrong-key"})
    raises(openai.AuthenticationError, lambda: stranger.invoke("Hello"))


def retries():
    flaky = Flaky(failures=1)
    patient = ChatOpenAI(**{**OPTIONS, "base_url": f"{flaky.url}/v1", "max_retries": 2})
    assert patient.invoke("Hello").content == chat_model.invoke("Hello").content and flaky.requests == 2


def a_full_server():
    waiting = ChatOpenAI(**{**OPTIONS, "base_url": f"{NARROW_URL}/v1"})
    with full_server():
        raises(openai.RateLimitError, lambda: waiting.invoke("Hello"))


run(
    [
        chat,
        blocks_of_other_dialects,
        streaming,
        batches,
        structured_output,
        completions,
        errors,
        keys,
        retries,
        a_full_server,
    ]
)
