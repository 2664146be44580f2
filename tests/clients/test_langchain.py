"""ChatOpenAI of LangChain."""

import openai
from common import KEY, URL, Flaky, picture, run
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

OPTIONS = {"model": "default", "base_url": f"{URL}/v1", "api_key": KEY, "max_tokens": 6, "max_retries": 0}
chat_model = ChatOpenAI(**OPTIONS)
SEEN = [
    SystemMessage("Be brief."),
    HumanMessage([{"type": "image_url", "image_url": {"url": picture()}}, {"type": "text", "text": "Who?"}]),
    AIMessage("A cat."),
    HumanMessage("Sure?"),
]


def chat():
    answer = chat_model.invoke(SEEN)
    assert answer.usage_metadata["output_tokens"] <= 6
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.response_metadata["model_name"]


def blocks_of_another_dialect():
    data = picture().split(",", 1)[1]
    for block in (
        {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": data}},
        {"type": "image", "base64": data, "mime_type": "image/jpeg"},
    ):
        answer = chat_model.invoke([HumanMessage([{"type": "text", "text": "Who?"}, block])])
        assert answer.usage_metadata["input_tokens"] > 5


def streaming():
    whole = chat_model.invoke(SEEN)
    joined = None
    for chunk in ChatOpenAI(**OPTIONS, stream_usage=True).stream(SEEN):
        joined = chunk if joined is None else joined + chunk
    assert joined.content == whole.content
    assert joined.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"]


def batches():
    answers = chat_model.batch([SEEN] * 4)
    assert len({answer.content for answer in answers}) == 1


def completions():
    assert isinstance(OpenAI(**OPTIONS).invoke("Hello"), str)


def errors():
    try:
        ChatOpenAI(**OPTIONS, temperature=1.9, top_p=7).invoke(SEEN)
        raise AssertionError("a bad top_p passed")
    except openai.BadRequestError as error:
        assert error.param == "top_p"


def retries():
    flaky = Flaky(failures=1)
    patient = ChatOpenAI(**{**OPTIONS, "base_url": f"{flaky.url}/v1", "max_retries": 2})
    assert patient.invoke("Hello").content is not None and flaky.requests == 2


run([chat, blocks_of_another_dialect, streaming, batches, completions, errors, retries])
