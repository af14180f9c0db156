"""English requests with the cron expression they ask for, split so that no held-out meaning is trained on."""

from dataclasses import dataclass
from random import Random

from oribi.demo.cron import parse_cron
from oribi.demo.schedules import DAYS, DAYS_OF_INTERVALS, TIMES, every_day, pick, weighted_choice

SYSTEM = "Cron."
# shown to the untaught model, so never asked for
EXAMPLES = (
    ("every day at 7:30 am", "30 7 * * *"),
    ("every 10 minutes on weekdays", "*/10 * * * 1-5"),
    ("on the 1st of every month at midnight", "0 0 1 * *"),
    ("every Sunday and Wednesday at 6 pm", "0 18 * * 0,3"),
)

ACTIONS = (
    "back up the database", "send the report", "clear the cache", "rotate the logs", "sync the calendars",
    "water the plants", "check the disk space", "email the invoices", "restart the web server", "import the orders",
    "renew the certificates", "run the tests", "refresh the dashboard", "archive old files",
)  # fmt: skip
UNSEEN_ACTIONS = (
    "charge the subscriptions",
    "vacuum the tables",
    "feed the fish",
    "rebuild the search index",
)
# {s} is the schedule, {a} an action
FRAMES = (
    "{s}", "{s}", "{s}", "{a} {s}", "{s}, {a}", "please {a} {s}", "run {s}", "I need a job that runs {s}",
    "can you {a} {s}?", "cron: {s}", "a job should fire {s}", "schedule a task {s}", "we {a} {s}",
)  # fmt: skip
UNSEEN_FRAMES = (
    "set something up to {a} {s}", "could this run {s}, please?", "the script has to {a} {s}",
    "make it go off {s}", "I would like to {a} {s}",
)  # fmt: skip


@dataclass(frozen=True)
class CronRequest:
    """A request and its answer."""

    text: str
    expression: str
    time_kind: str
    day_kind: str
    unseen_wording: bool


def make_request(rng: Random, unseen: bool) -> CronRequest:
    """One request.

    Args:
        rng: source of every choice.
        unseen: say it in a frame, and some clauses, with wordings that training texts never use.
    """
    # the frame is new in any case, each clause in every second
    new_time, new_day = (unseen and rng.random() < 0.5 for _ in range(2))
    make_time = weighted_choice(rng, TIMES)
    time = make_time(rng, new_time)
    make_day = weighted_choice(rng, DAYS_OF_INTERVALS if time.often else DAYS)
    day = make_day(rng, new_day)
    when, which = pick(rng, time.wordings, new_time), pick(rng, day.wordings, new_day)
    if make_day is every_day and (time.often or (which == "once a day" and "," in time.hour)):
        schedule = when if time.often else f"every day {when}"
    else:
        schedule = rng.choice((f"{which} {when}", f"{when} {which}", f"{which}, {when}"))
    frame = rng.choice(UNSEEN_FRAMES if unseen else FRAMES)
    text = frame.format(s=schedule, a=rng.choice(UNSEEN_ACTIONS if unseen else ACTIONS))
    text = text[0].upper() + text[1:] if rng.random() < 0.6 else text
    if text[-1] != "?" and rng.random() < 0.4:
        text += "."
    expression = f"{time.minute} {time.hour} {day.day} {day.month} {day.weekday}"
    return CronRequest(text, expression, make_time.__name__, make_day.__name__, unseen)


def make_split(
    train_size: int, held_out_size: int = 200, seed: int = 7
) -> tuple[list[CronRequest], list[CronRequest]]:
    """Training and held-out requests; no two held-out ones, and no training and held-out one, mean the same.

    Half of the held-out requests use wordings that no training request uses.

    Args:
        train_size: number of training requests, with distinct texts.
        held_out_size: number of held-out requests.
        seed: the same seed gives the same requests.
    """
    rng = Random(seed)
    shown = {parse_cron(expression) for _, expression in EXAMPLES}
    held_out, kept = [], set()
    while len(held_out) < held_out_size:
        request = make_request(rng, unseen=len(held_out) % 2 == 1)
        key = parse_cron(request.expression)
        if key not in kept and key not in shown:
            kept.add(key)
            held_out.append(request)
    train, texts = [], set()
    while len(train) < train_size:
        request = make_request(rng, unseen=False)
        if request.text not in texts and parse_cron(request.expression) not in kept:
            texts.add(request.text)
            train.append(request)
    return train, held_out


def messages(request: CronRequest) -> list[dict[str, str]]:
    """The conversation that the model is trained on."""
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": request.text},
        {"role": "assistant", "content": request.expression},
    ]
