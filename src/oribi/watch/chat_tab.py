"""The tab in which a run's model and its base answer side by side."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from oribi.watch.fragments import nothing_html
from oribi.watch.runs import Watched
from oribi.watch.talk import Talk, TalkError, model_words, why_no_talk

MODELS = ("base", "tuned")
LONGEST = 2048


def chat_tab(watched: Watched, talk: Talk, chosen: gr.Dropdown, timer: gr.Timer, page: gr.Blocks) -> None:
    """Draw the tab.

    Args:
        watched: the runs. talk: the model. chosen: the run that is shown. timer, page: at whose events the tab is looked after.
    """
    state = gr.HTML()
    with gr.Row():
        load, unload = gr.Button("Load the run's model", variant="primary"), gr.Button("Unload it")
    with gr.Row():
        boxes = [
            gr.Chatbot(label=name, height=380, elem_classes="oribi-talk", render_markdown=False, buttons=["copy"], feedback_options=None, allow_tags=False)
            for name in MODELS
        ]  # fmt: skip
    question = gr.Textbox(
        label="Question",
        placeholder="Enter sends, Shift+Enter begins a new line",
        lines=1,
        max_lines=8,
        submit_btn="Ask",
        interactive=True,
    )
    with gr.Row():
        longest = gr.Slider(1, LONGEST, value=256, step=1, label="Longest answer in tokens")
        temperature = gr.Slider(
            0, 2, value=0, step=0.05, label="Temperature (0 always takes the most likely token)"
        )
    fresh = gr.Button("New conversation")
    shown = gr.State("")

    def words(name: str | None) -> str:
        run = watched.runs.get(name or "")
        if talk.is_loading:
            return nothing_html("The model is being loaded.")
        if talk.run:
            return nothing_html(
                f"The model of {talk.run} is loaded"
                + ("." if talk.compares else "; it has no adapter, so there is no base beside it.")
            )
        if run is None:
            return nothing_html("Choose a run.")
        reason = why_no_talk(run, watched)
        return nothing_html(f"Off: {reason}." if reason else f"Ready to load {model_words(run)}.")

    def look(name: str | None, before: str) -> tuple[Any, str]:
        now = words(name)
        return (gr.skip() if now == before else now), now

    def start(name: str | None) -> str:
        run = watched.runs.get(name or "")
        watched.refresh([])
        reason = "choose a run" if run is None else why_no_talk(run, watched)
        if reason:
            return nothing_html(f"Off: {reason}.")
        try:
            talk.load(run)
        except TalkError as error:
            return nothing_html(f"The model of {run.name} cannot be loaded: {error}")
        return words(name)

    def stop(name: str | None) -> str:
        talk.close()
        return words(name)

    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    load.click(start, [chosen], [state], show_progress="minimal", api_visibility="private")
    unload.click(stop, [chosen], [state], **quiet)
    for event in (timer.tick, page.load, chosen.input):
        event(look, [chosen, shown], [state, shown], **quiet)
    asks = question.submit(
        answering(talk), [question, longest, temperature, *boxes], [question, *boxes], **quiet
    )
    fresh.click(lambda: ([], []), None, boxes, cancels=[asks], **quiet)


def answering(talk: Talk) -> Any:
    """The function that asks the models one after the other and hands their answers on as they come."""

    def ask(
        question: str, longest: int, temperature: float, *before: list[dict[str, Any]]
    ) -> Iterator[tuple[Any, ...]]:
        if not question.strip():
            yield (gr.skip(), *before)
            return
        talks = {
            name: [*_plain(said), {"role": "user", "content": question}] for name, said in zip(MODELS, before)
        }
        if talk.run and not talk.compares:
            talks["base"] = list(before[0])
        yield ("", *talks.values())
        for name in MODELS if talk.compares else MODELS[1:]:
            asked, text = talks[name], ""
            try:
                for reply in talk.answer(name, asked, longest, temperature):
                    text = reply.get("text", text + reply.get("piece", ""))
                    talks[name] = [*asked, {"role": "assistant", "content": text}]
                    yield (gr.skip(), *talks.values())
            except TalkError as error:
                gr.Warning(str(error))
                talks[name] = asked
                yield (gr.skip(), *talks.values())
                return

    return ask


def _plain(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A conversation as gradio hands it back, in messages of role and text."""

    def text(content: Any) -> str:
        if isinstance(content, str):
            return content
        parts = content if isinstance(content, list) else [content]
        return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in parts)

    return [{"role": one["role"], "content": text(one["content"])} for one in messages]
