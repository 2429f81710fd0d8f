"""Asks a running server through the clients that people use, and prints what came back.

    pip install langchain-openai litellm instructor
    python benchmarks/clients.py --url http://127.0.0.1:8000/v1 --model finetune

A client that is not installed is skipped; one that fails is printed with its error, and the exit status is 1.
"""

import argparse
import base64
import importlib.metadata
import io
import sys
from collections.abc import Callable
from typing import Literal

from PIL import Image
from pydantic import BaseModel


class Colour(BaseModel):
    colour: Literal["red", "green", "blue"]


def image_url() -> str:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (220, 30, 30)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


PARTS = [{"type": "text", "text": "What colour is it?"}, {"type": "image_url", "image_url": {"url": image_url()}}]
MESSAGES = [{"role": "user", "content": PARTS}]


def ask_openai(url: str, model: str) -> dict[str, Callable[[], object]]:
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    chat = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 400}
    given = [{"type": "input_text", "text": "What colour is it?"}, {"type": "input_image", "image_url": image_url()}]
    response = {"model": model, "input": [{"role": "user", "content": given}], "temperature": 0}
    return {
        "chat": lambda: client.chat.completions.create(**chat).choices[0].message.content,
        "chat, streamed": lambda: "".join(
            chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(stream=True, **chat)
        ),
        "chat, parsed": lambda: client.chat.completions.parse(response_format=Colour, **chat).choices[0].message.parsed,
        "completions": lambda: client.completions.create(model=model, prompt="It is", temperature=0).choices[0].text,
        "responses": lambda: client.responses.create(max_output_tokens=20, **response).output_text,
        "responses, parsed": lambda: client.responses.parse(text_format=Colour, **response).output_parsed,
    }


def ask_langchain(url: str, model: str) -> dict[str, Callable[[], object]]:
    from langchain_core.messages import HumanMessage
    from langchain_openai import ChatOpenAI

    options = {"model": model, "base_url": url, "api_key": "none", "temperature": 0, "max_tokens": 400}
    chat, messages = ChatOpenAI(**options), [HumanMessage(content=PARTS)]
    return {
        "invoke": lambda: chat.invoke(messages).content,
        "stream": lambda: "".join(chunk.content for chunk in chat.stream(messages)),
        "with_structured_output": lambda: chat.with_structured_output(Colour).invoke(messages),
        "responses": lambda: ChatOpenAI(use_responses_api=True, **options).invoke("Hello").text,
    }


def ask_litellm(url: str, model: str) -> dict[str, Callable[[], object]]:
    import litellm

    options = {"api_base": url, "api_key": "none", "messages": MESSAGES, "temperature": 0, "max_tokens": 400}

    def content(provider: str, **more: object) -> str:
        return litellm.completion(model=f"{provider}/{model}", **options, **more).choices[0].message.content

    return {
        "hosted_vllm": lambda: content("hosted_vllm"),
        "openai": lambda: content("openai"),
        "response_format": lambda: Colour.model_validate_json(content("hosted_vllm", response_format=Colour)),
        "penalties, top_k, min_p": lambda: content(
            "hosted_vllm", frequency_penalty=0.5, presence_penalty=0.5, top_k=20, min_p=0.1, repetition_penalty=1.1
        ),
    }


def ask_instructor(url: str, model: str) -> dict[str, Callable[[], object]]:
    import instructor
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)

    asked = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA).chat.completions
    options = {"model": model, "messages": MESSAGES, "max_tokens": 400, "max_retries": 0}
    return {"response_model": lambda: asked.create(response_model=Colour, **options)}


CLIENTS = {
    "openai": ask_openai,
    "langchain-openai": ask_langchain,
    "litellm": ask_litellm,
    "instructor": ask_instructor,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=True)
    args = parser.parse_args()
    failed = 0
    for package, client in CLIENTS.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            print(f"{package}: not installed")
            continue
        for name, ask in client(args.url, args.model).items():
            try:
                outcome = repr(ask())
            except Exception as error:
                failed += 1
                outcome = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"{package} {version}, {name}: {outcome[:100] if 'FAILED' not in outcome else outcome}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
