"""Lets people rank answers on a page of this machine: python -m experiments.label --tasks=FILE --labellers=ann,ben.

FILE holds prompts with several answers each, as `python -m experiments.rank --labellers=0` writes them.
docs/labelling.md says what the page asks and what becomes of the answers.
"""

import dataclasses
import pathlib
import socket
from typing import Annotated
from urllib.parse import urlsplit

from etils import epath

from rlhf_jax import flags
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import exchange
from rlhf_jax.feedback.assignment import Terms
from rlhf_jax.feedback.page.guard import LOCAL
from rlhf_jax.feedback.record import Record

INSTALL = "pip install 'rlhf_jax[label]'"
EVERYWHERE = ("0.0.0.0", "::")  # to listen at; nobody can open them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label(Terms):
    """Serves tasks to people, and keeps what they say in a record; or adds judgements to one, or writes rows of it."""

    tasks: Annotated[str, "JSONL of prompts with completions (the record is FILE.db beside it), or a record, FILE.db"]
    labellers: Annotated[tuple[str, ...], "names of the people who are let in, by a link each"] = ()
    labels: Annotated[int | None, "people that judge each task; none: as the record has it, 3 of a new task"] = None
    guidelines: Annotated[str | None, "text or Markdown file shown beside each task; its hash is its version"] = None
    scale: Annotated[int, "answers are also rated, 1 to this; 0: they aren't"] = 0
    cost_per_hour: Annotated[float | None, "what an hour of a labeller costs; none: costs are not shown"] = None
    host: Annotated[str, "address to listen at; any but this machine's own lets others in"] = "127.0.0.1"
    port: Annotated[int, "port to listen at"] = 8017
    address: Annotated[str | None, "what links begin with, https://NAME, if a proxy stands before the page"] = None
    new_links: Annotated[bool, "make new links for --labellers and the owner; the old ones end"] = False
    judged: Annotated[str | None, "file of rankings, pairs, trees or sheets by people, added to the record"] = None
    export: Annotated[str | None, "JSONL file to write; the program ends then"] = None
    export_as: Annotated[exchange.Rows, "what --export writes"] = "rankings"


def check_flags(program: Label) -> None:
    """Errors: UserError for whatever can be seen before anything is opened."""
    for name, least in {"labels": 1, "scale": 0, "port": 1}.items():
        if (value := getattr(program, name)) is not None and value < least:
            raise UserError(f"--{name}={getattr(program, name)} is not allowed; it must be at least {least}.")
    if program.scale == 1 or program.scale > 10:
        raise UserError(f"--scale={program.scale} is not allowed; it must be 0, or from 2 to 10.")
    if program.port > 65535:
        raise UserError(f"--port={program.port} is not allowed; it must be at most 65535.")
    if program.cost_per_hour is not None and not 0 <= program.cost_per_hour < 1e9:
        raise UserError(f"--cost_per_hour={program.cost_per_hour} is not allowed; it must be at least 0.")
    for name in program.labellers:
        if not name.strip() or name != name.strip() or len(name) > 60 or not name.isprintable():
            raise UserError(f"{name!r} is no name for a labeller; give --labellers=ann,ben.")
    if program.address is not None and not _is_address(program.address):
        raise UserError(f"--address={program.address} is no address; give https://NAME or https://NAME:PORT alone.")
    if "://" in program.tasks:
        raise UserError(f"--tasks={program.tasks} is not on this machine, as the record must be; copy it here.")
    if program.export is not None and _exists(program.export):
        raise UserError(f"--export={program.export} already exists; give a new file.")
    if not (program.labellers or program.export or program.judged or program.new_links):
        raise UserError(
            "nobody is to label; give --labellers=ann,ben, or --export=FILE.jsonl, or --judged=FILE, or --new_links "
            "for a new link of the owner's."
        )


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        named = bool(parts.hostname) and "@" not in parts.netloc and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and named and not (parts.path.strip("/") or parts.query or parts.fragment)


def _exists(path: str) -> bool:
    try:
        return epath.Path(path).expanduser().exists()
    except ImportError as error:  # gs:// needs a package of its own
        raise UserError(f"--export={path} can't be written here ({error}); run `pip install gcsfs`.") from error


def open_record(program: Label) -> Record:
    """The record, with the tasks of the file in it if people are to label. Errors: UserError where there is neither."""
    file = pathlib.Path(program.tasks).expanduser()
    if file.suffix == ".db" or program.export is not None:  # which shows what is there and changes nothing
        place = file.with_suffix(".db")
        if not place.exists() and program.judged is None:
            raise UserError(f"there is no record {place}; give --tasks a file of prompts and answers first.")
        return Record(place)
    tasks = exchange.tasks_of(program.tasks, program.labels)
    record = Record(file.with_suffix(".db"))
    new = record.add(tasks)
    print(f"{record.path}: {new} new tasks of {len(tasks)} in {program.tasks}, {len(record.tasks())} in all")
    return record


def add_judged(program: Label, record: Record, path: str) -> None:
    """Adds judgements from elsewhere and says how many."""
    count, new, left = exchange.judged(record, path, program.labels)
    print(f"{new} new judgements of {count} in {path}; {len(left)} rows left out")
    for reason in left[:3]:
        print(f"  {reason}")


def write(program: Label, record: Record, path: str) -> None:
    """Writes rows. Errors: UserError if there are none, or the file can't be written."""
    rows = exchange.EXPORTS[program.export_as](record)
    if not rows:
        raise UserError(
            f"{record.path} holds no {program.export_as} yet; let people label, or give another --export_as."
        )
    file = epath.Path(path).expanduser()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(exchange.lines(rows))
    except OSError as error:
        raise UserError(f"--export={path} can't be written ({error.strerror}); give another file.") from error
    print(f"wrote {len(rows)} rows of {program.export_as} to {file}")


def links(program: Label, record: Record, address: str) -> None:
    """Makes the links that are missing, and prints them: they are not kept, and can't be printed again."""
    people = [(name, "labeller", "/") for name in program.labellers] + [("owner", "owner", "/board")]
    for name, role, page in people:
        secret = record.link(name, role, program.new_links)
        told = f"{address}{page}#{secret}" if secret else "has a link already (--new_links makes another)"
        print(f"{name:>12}: {told}")


def serve(program: Label, record: Record) -> None:
    """Serves the page until it is stopped. Errors: UserError without the web framework, or if the port is taken."""
    try:
        import uvicorn

        from rlhf_jax.feedback.page import app
    except ImportError as error:
        raise UserError(f"the page needs a web framework ({error.name} is missing); run {INSTALL}.") from error
    text = ""
    if program.guidelines is not None:
        try:
            text = epath.Path(program.guidelines).expanduser().read_text()
        except (OSError, UnicodeDecodeError, ImportError) as error:
            raise UserError(f"--guidelines={program.guidelines} can't be read ({error}); give a text file.") from error
    terms = Terms(**{f.name: getattr(program, f.name) for f in dataclasses.fields(Terms)})
    guidelines = text, record.guide(text)
    desk = app.Desk(record, terms, guidelines, program.scale, program.cost_per_hour, program.labellers)
    check_port(program)
    if program.host not in LOCAL:
        print(
            f"warning: --host={program.host} lets other machines in, without encryption: whoever can read the network"
        )
        print("         can read the links; keep it to a network that you trust, or behind a tunnel.")
    address = address_of(program)
    links(program, record, address)
    print("each link is a secret of its own; stop with Ctrl+C, and start again with the same command", flush=True)
    uvicorn.run(
        app.make(desk, program.host, address), host=program.host, port=program.port, log_level="warning",
        access_log=False, server_header=False, timeout_graceful_shutdown=3,
    )  # fmt: skip


def address_of(program: Label) -> str:
    """What links begin with, as a browser writes it."""
    if program.address is not None:
        return program.address.rstrip("/").lower()
    name = socket.gethostname().lower() if program.host in EVERYWHERE else program.host
    return f"http://[{name}]:{program.port}" if ":" in name else f"http://{name}:{program.port}"


def check_port(program: Label) -> None:
    """Errors: UserError if nothing can listen there: links that lead nowhere must not be printed."""
    try:
        family = socket.getaddrinfo(program.host, program.port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((program.host, program.port))
    except OSError as error:
        raise UserError(
            f"nothing can listen at {program.host}:{program.port} ({error.strerror}); give another --port or --host."
        ) from error


def main(program: Label) -> None:
    """Runs it."""
    check_flags(program)
    record = open_record(program)
    if program.judged is not None:
        add_judged(program, record, program.judged)
    if program.export is not None:
        write(program, record, program.export)
    elif program.labellers or program.new_links:
        serve(program, record)


if __name__ == "__main__":
    flags.run(main, Label)
