"""The commands in the pages: found, taken apart, and parsed as the command line would.

A command stands in a block (fenced or indented) or in a span of code.  One in a block is parsed to its end;
in a span, and where a word stands for something of the reader's (FILE, RUN, …), only the names of its
options and the values that are given are looked at.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dualroute.cli.entry import parse_stage
from dualroute.cli.family import family_parser
from dualroute.cli.read import Given, split_words
from dualroute.cli.schema import schema_of
from dualroute.cli.submit.command import build_parser
from dualroute.cli.table import FAMILIES, OTHERS, STAGES
from dualroute.configuration.shipped import find_config, shipped_configs
from dualroute.errors import UserError

_FENCE = re.compile(r"^( *)```(\w*)\s*$")
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_ENVIRONMENT = re.compile(r"[A-Z_]+=\S*")
_PLACEHOLDER = re.compile(r".*…|\.\.\.|[A-Z][A-Z_]+(/[\w.]+)?|.*\bNAME\b.*|\$\w+|N")
_OPTIONAL = re.compile(r"\[(--?[\w.…-]+(?: [^\[\]]*)?)\]")  # as in a usage: [--key VALUE]
#: Between a command and what a page says of it.
_ASIDE = re.compile(r"(?<=\S)\s{3,}(?![-\s])")
#: Words that start ranks, before the script or module that they start.
LAUNCHERS = ("torchrun", "deepspeed", "srun", "python")
STAGE_OF_SCRIPT = {"pretrain", "distill", "finetune", "doctor", "pipeline"}


@dataclass(frozen=True)
class Command:
    """One command of a page.

    Attributes:
        page, line: Where it stands.
        words: Without variables of the environment, comments, and what follows a pipe.
        whole: It can be parsed to its end.
    """

    page: Path
    line: int
    words: tuple[str, ...]
    whole: bool

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}: {' '.join(self.words)}"


def blocks(text: str) -> Iterator[tuple[int, str, str, str]]:
    """(line, language, content, the comment ``<!-- run… -->`` before it) of each block of code."""
    lines = text.split("\n")
    number = 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        if fence and fence[2] is not None:
            end = next(k for k in range(number + 1, len(lines)) if lines[k].strip() == "```")
            before = lines[number - 1] if number and lines[number - 1].startswith("<!-- run") else ""
            yield number + 2, fence[2], "\n".join(lines[number + 1 : end]), before
            number = end + 1
        elif lines[number].startswith("    ") and (number == 0 or not lines[number - 1].strip()):
            end = next(
                (
                    k
                    for k in range(number, len(lines))
                    if lines[k].strip() and not lines[k].startswith("    ")
                ),
                len(lines),
            )
            yield number + 1, "", "\n".join(line[4:] for line in lines[number:end]), ""
            number = end
        else:
            number += 1


def commands(page: Path) -> list[Command]:
    """All commands of a page."""
    text = page.read_text(encoding="utf-8")
    found: list[Command] = []
    inside: set[int] = set()
    for line, language, content, _ in blocks(text):
        inside.update(range(line, line + content.count("\n") + 1))
        if language in ("", "bash", "sh"):
            found += [Command(page, line + k, words, True) for k, words in shell_commands(content)]
    for number, line_text in enumerate(text.split("\n"), 1):
        if number not in inside:
            for span in _SPAN.findall(line_text):
                found += [Command(page, number, words, False) for _, words in shell_commands(span)]
    return found


def shell_commands(text: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, words) of the commands in a piece of shell: what this project or its scripts are started by."""
    variables: dict[str, str] = {}
    lines = text.split("\n")
    number = 0
    while number < len(lines):
        first, line = number, lines[number]
        while line.endswith("\\") and number + 1 < len(lines):
            number += 1
            line = line[:-1] + lines[number]
        number += 1
        line = line.strip()
        loop = re.match(r"for (\w+) in (\S+)", line)
        if loop:
            variables[loop[1]] = loop[2].rstrip(";")
        given = re.fullmatch(r'(\w+)=(?:"([^"]*)"|(\S+))', line)
        if given:
            variables[given[1]] = substituted(given[2] or given[3] or "", variables)
        line = _OPTIONAL.sub(r"\1", _ASIDE.split(substituted(line, variables))[0])
        for part in re.split(r"(?:\s(?:\||&&|;|>|>>|2>)\s|[;&]\s*$|<\()", line):
            words = _split(part)
            while words and (_ENVIRONMENT.fullmatch(words[0]) or words[0] in ("time", "nohup", "exec")):
                words = words[1:]
            if words and words[0] in ("dualroute", *LAUNCHERS, "bash"):
                yield first, tuple(words)


def substituted(text: str, variables: dict[str, str]) -> str:
    """``$name`` and ``${name}`` of known variables."""
    return re.sub(r"\$\{?(\w+)\}?", lambda one: variables.get(one[1], one[0]), text)


def _split(part: str) -> list[str]:
    part = part.replace("(", " ").replace(")", " ") if part.count("(") != part.count(")") else part
    try:
        return shlex.split(part, comments=True)
    except ValueError:  # a sentence with an apostrophe
        return []


def problem(command: Command) -> str | None:
    """What is wrong with a command, in words."""
    try:
        _check(command)
    except UserError as error:
        return f"{command}: {error}"
    return None


def _check(command: Command) -> None:
    words = list(command.words)
    if words[0] == "dualroute":
        _check_dualroute(words[1:], command.whole)
    elif words[0] != "bash":
        _check_launched(words, command.whole)


def _check_launched(words: list[str], whole: bool) -> None:
    module = words.index("-m") + 1 if "-m" in words[:-1] else None
    script = next((k for k, word in enumerate(words) if word.endswith(".py")), None)
    if module is not None and words[module] == "dualroute":
        _check_dualroute(words[module + 1 :], whole)
    elif script is not None and words[script].startswith("launch/"):
        stage = Path(words[script]).stem
        if stage in STAGE_OF_SCRIPT:
            _check_dualroute([stage, *words[script + 1 :]], whole)
    elif script is not None and words[script].startswith("benchmarks/"):
        _check_benchmark(Path(words[script]), words[script + 1 :])


def _check_benchmark(script: Path, words: list[str]) -> None:
    """Each option is one that the script, or a module of the benchmarks that it imports, declares."""
    root = Path(__file__).resolve().parents[2]
    if not (root / script).is_file():
        raise UserError(f"there is no {script}")
    text = (root / script).read_text()
    near = [*(root / "benchmarks").glob("*.py"), *(root / script).parent.glob("*.py")]
    text += "".join(
        path.read_text() for path in near if re.search(rf"import.*\b{path.stem}\b|{path.stem} import", text)
    )
    for word in words:
        name = word.partition("=")[0]
        key = name[2:].replace("-", "_").removeprefix("no_")
        if name.startswith("--") and key not in text.replace("-", "_"):
            raise UserError(f"{script} has no option {name}")


def _check_dualroute(words: list[str], whole: bool) -> None:
    if not words or words[0][0] in "-…" or not words[0].islower() or words[0].endswith(":"):
        return  # the program's name alone, `dualroute COMMAND`, or a line that it prints
    name, rest = words[0].rstrip(","), words[1:]
    if name in FAMILIES:
        _check_family(name, rest, whole)
    elif name in OTHERS:
        if name == "submit" and rest:
            mine = rest[: rest.index("--")] if "--" in rest else rest
            if whole or "--config" in mine:
                build_parser().parse_args(mine)
        shown = rest[1:2] if name == "configs" and rest[:1] == ["show"] else []
        if any(not _PLACEHOLDER.fullmatch(one) and one not in shipped_configs() for one in shown):
            raise UserError(f"there is no configuration {shown[0]}")
    else:
        if rest and f"{name} {rest[0]}" in STAGES:
            name, rest = f"{name} {rest[0]}", rest[1:]
        alone = not rest or _PLACEHOLDER.fullmatch(rest[0])
        if alone and name not in STAGES and any(stage.startswith(f"{name} ") for stage in STAGES):
            return  # `dualroute data …`
        if name not in STAGES:
            raise UserError(f"there is no command {name}")
        _check_stage(name, rest, whole)


def _check_family(name: str, words: list[str], whole: bool) -> None:
    if words and words[0] not in FAMILIES[name].commands:
        raise UserError(f"there is no command {name} {words[0]}")
    if whole and words and not any(word in ("…", "...") for word in words):
        family_parser(name).parse_args(words)


def _check_stage(stage: str, words: list[str], whole: bool) -> None:
    if "--help" in words or "-h" in words:
        return
    schema = schema_of(STAGES[stage].config_class())
    plain = list(words)
    for argument in STAGES[stage].arguments:
        if plain and not plain[0].startswith("-"):
            plain = [f"--{argument}", *plain]
            plain = [*plain[2:], *plain[:2]]
    known, configs = [], []
    k = 0
    while k < len(plain):
        option, value = plain[k], plain[k + 1] if k + 1 < len(plain) else None
        if option in ("…", "...") or option.startswith("$"):
            whole, k = False, k + 1
            continue
        if "…" in option:  # --sampling.…
            whole, k = False, k + 1
            _check_key(option.partition("…")[0].rstrip("."), stage)
            continue
        if not option.startswith("--"):
            known, k = [*known, option], k + 1
            continue
        if option == "--config" and value is not None:
            while k + 1 < len(plain) and not plain[k + 1].startswith("--"):
                configs.append(plain[k + 1])
                k += 1
            k += 1
            continue
        placeholder = value is not None and (_PLACEHOLDER.fullmatch(value) is not None or "|" in value)
        if placeholder or (value is None and not whole):
            _check_key(option, stage)
            whole = False
            k += 2
            continue
        known.append(option)
        k += 1
    if any(_PLACEHOLDER.fullmatch(name) for name in configs):
        whole, configs = False, []
    ours = [name for name in configs if name.startswith("configs/") or name in shipped_configs()]
    for name in ours:
        find_config(name)
    if whole and ours == configs:
        parse_stage(stage, [*(word for name in configs for word in ("--config", name)), *known])
        return
    given = Given(schema)
    given.add_flags(
        [
            flag
            for flag in split_words(known, schema).flags
            if flag[1] is not None or _check_key(flag[2], stage)
        ]
    )
    given.converted()


def _check_key(option: str, stage: str) -> bool:
    """Whether an option takes no value; refuses one that there is not."""
    schema = schema_of(STAGES[stage].config_class())
    key = option.partition("=")[0].removeprefix("--").replace("-", "_")
    names = {*schema.keys(), "print_config", "config", "from", *(f"no_{name}" for name in schema.options)}
    if key not in names and not any(name.startswith(f"{key}.") for name in names):
        raise UserError(f"{stage} has no option --{key}")
    return key in schema.options and schema.options[key].is_switch
