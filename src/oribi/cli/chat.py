"""`oribi chat RUN`."""

import sys
from contextlib import nullcontext
from typing import Annotated, Any

import typer

from oribi.cli.output import Json, Output, chatter_aside

COMMANDS = "/new starts over, /quit ends"


def chat(
    model: Annotated[str, typer.Argument(help="Run, adapter, model folder, GGUF file or hub name.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Ask this and stop; repeat for more turns.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Answer without the adapter.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 is greedy (default: the model's own settings).")
    ] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Nucleus sampling.")] = None,
    json: Json = False,
) -> None:
    """Talk to a trained model.

    Reads questions from the terminal, from --prompt, or line by line from a pipe. A model without a chat template
    continues each text.
    """
    with chatter_aside():
        from transformers.utils.logging import set_verbosity_error

        from oribi.errors import ConfigError
        from oribi.models.generate import PrintableStreamer, answer
        from oribi.run import load_run

        set_verbosity_error()
        loaded = load_run(model)
        if loaded.model.get_output_embeddings() is None:
            raise ConfigError(
                f"{model} scores texts and writes none; `oribi eval` shows what a reward model prefers"
            )
        if base and not loaded.has_adapter:
            raise ConfigError(f"--base: {model} has no adapter that could be left out")
    output = Output(json)
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    talks = bool(loaded.tokenizer.chat_template)
    opening = [{"role": "system", "content": system}] if system else []
    messages: list[dict[str, Any]] = list(opening)
    for question in _questions(prompt, json):
        if question == "/quit":
            break
        if question == "/new":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": question})
        streams = not json and sys.stdout.isatty()
        streamer = (
            PrintableStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
            if streams
            else None
        )
        with loaded.model.disable_adapter() if base else nullcontext():
            said = answer(
                loaded.model, loaded.tokenizer, messages if talks else question, streamer=streamer, **settings
            )
        messages.append({"role": "assistant", "content": said.text})
        if not streams:
            output.text(said.text)
        output.record(
            prompt=question, answer=said.text, tokens=said.tokens, stopped=said.stopped,
            seconds=round(said.seconds, 3),
        )  # fmt: skip


def _questions(prompt: list[str] | None, json: bool):
    if prompt:
        yield from prompt
    elif sys.stdin.isatty():
        typer.echo(COMMANDS, err=True)
        while True:
            try:
                question = input("> ").strip()
            except EOFError:
                return
            if question:
                yield question
    else:
        yield from (line.strip() for line in sys.stdin if line.strip())
