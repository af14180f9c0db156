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
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Answer without and with the adapter, each going on from its own answers."
        ),
    ] = False,
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
        from oribi.run import load_run

        set_verbosity_error()
        loaded = load_run(model)
        if loaded.model.get_output_embeddings() is None:
            raise ConfigError(
                f"{model} scores texts and writes none; `oribi eval` shows what a reward model prefers"
            )
        for option, given in (("--base", base), ("--compare", compare)):
            if given and not loaded.has_adapter:
                raise ConfigError(f"{option}: {model} has no adapter that could be left out")
        if base and compare:
            raise ConfigError(
                "--base and --compare: --compare answers without the adapter, too; leave out --base"
            )
    output = Output(json)
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    talks = bool(loaded.tokenizer.chat_template)
    opening = [{"role": "system", "content": system}] if system else []
    names = ("base", "tuned") if compare else ("base",) if base else ("tuned",)
    streams = not json and sys.stdout.isatty()

    def conversations() -> dict[str, list[dict[str, Any]]]:
        return {name: list(opening) for name in names}

    messages = conversations()
    for question in _questions(prompt, json):
        if question == "/quit":
            break
        if question == "/new":
            messages = conversations()
            continue
        texts = {}
        for name, conversation in messages.items():
            conversation.append({"role": "user", "content": question})
            if streams and compare:
                typer.echo(f"{name}:")
            asked = conversation if talks else question
            said = _answer(loaded, asked, name == "base" and loaded.has_adapter, streams, settings)
            conversation.append({"role": "assistant", "content": said.text})
            texts[name] = said.text
            output.record(
                prompt=question, **({"model": name} if compare else {}), answer=said.text, tokens=said.tokens,
                stopped=said.stopped, seconds=round(said.seconds, 3), tokens_per_second=round(said.tokens_per_second, 1),
            )  # fmt: skip
        if compare and not streams:
            output.fields(texts)
        elif not streams:
            output.text(texts[names[0]])


def _answer(loaded: Any, asked: Any, without_adapter: bool, streams: bool, settings: dict[str, Any]) -> Any:
    """The answer to a conversation or text; on a terminal as it comes, with its speed behind it."""
    from oribi.models.generate import PrintableStreamer, answer

    streamer = None
    if streams:
        streamer = PrintableStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    if loaded.config is not None:  # a run's model is asked in the form that it was trained on
        settings = {**settings, "chat_template_kwargs": loaded.config.chat_template_kwargs}
    with loaded.model.disable_adapter() if without_adapter else nullcontext():
        said = answer(loaded.model, loaded.tokenizer, asked, streamer=streamer, **settings)
    if streams:
        typer.echo(f"{said.tokens} tokens, {said.tokens_per_second:.1f} tokens/s", err=True)
    return said


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
