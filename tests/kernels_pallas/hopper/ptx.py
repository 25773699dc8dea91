"""PTX parsed: one entry function, as instructions with typed operands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


class UnknownInstructionError(NotImplementedError):
    """An instruction, or a form of it, that the executor does not know."""


@dataclass(frozen=True)
class Register:
    """A register or a special one (`%tid.x`); `_` takes what nobody wants."""

    name: str
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    """A number, or the bits of a float."""

    value: int


@dataclass(frozen=True)
class Symbol:
    """The address of a variable or of a parameter, or a label."""

    name: str


@dataclass(frozen=True)
class Vector:
    """Several registers: {%r1, %r2}, or %r1|%p1."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """[base + offset] in bytes; with coordinates, of a tensor, the fastest axis first."""

    base: Operand
    offset: int = 0
    coordinates: tuple[Operand, ...] = ()


Operand = Register | Immediate | Symbol | Vector | Address


@dataclass(frozen=True)
class Instruction:
    """One statement.

    Attributes:
        text: as it stands in the program, for messages.
        parts: of the opcode, between dots: ("add", "s32").
        guard: the predicate of lanes that execute it, all of them if None.
    """

    text: str
    parts: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None = None

    @property
    def opcode(self) -> str:
        return ".".join(self.parts)

    def unknown(self) -> UnknownInstructionError:
        return UnknownInstructionError(f"the executor does not know {self.text!r}")


@dataclass(frozen=True)
class Program:
    """Instructions, and for each branch the one that it leads to."""

    instructions: tuple[Instruction, ...]
    targets: dict[int, int]


@dataclass
class _Scope:
    """Where we are among braces, which inline assembly puts around labels of its own."""

    path: list[int] = field(default_factory=lambda: [0])
    opened: int = 0

    def enter(self) -> None:
        self.opened += 1
        self.path.append(self.opened)


def parse(text: str) -> Program:
    """The entry function of a module.

    Raises:
        ValueError: there is not one entry function, or a branch leads nowhere.
    """
    if text.count(".entry") != 1:
        raise ValueError(f"{text.count('.entry')} entry functions, expected one")
    body = text[text.index(".entry") :]
    body = body[body.index("\n{") + 2 :]
    scope, labels = _Scope(), dict[tuple[int, str], int]()
    instructions, paths = list[Instruction](), list[tuple[int, ...]]()
    for statement in _statements(body):
        if statement == "{":
            scope.enter()
        elif statement == "}":
            scope.path.pop()
            if not scope.path:
                break
        elif statement.endswith(":"):
            labels[scope.path[-1], statement[:-1]] = len(instructions)
        elif not statement.startswith("."):  # a declaration, or where a line came from
            instructions.append(_instruction(statement))
            paths.append(tuple(scope.path))
    targets = {
        i: _target(instruction, path, labels)
        for i, (instruction, path) in enumerate(zip(instructions, paths, strict=True))
        if instruction.parts[0] == "bra"
    }
    return Program(tuple(instructions), targets)


def _target(branch: Instruction, path: tuple[int, ...], labels: dict[tuple[int, str], int]) -> int:
    [label] = branch.operands
    for scope in reversed(path):
        if isinstance(label, Symbol) and (scope, label.name) in labels:
            return labels[scope, label.name]
    raise ValueError(f"{branch.text!r} leads nowhere")


def _statements(body: str) -> Iterator[str]:
    """Labels with their colons, braces of scopes, and what ends in a semicolon without it."""
    body = re.sub(r"//[^\n]*|\n[ \t]*\.loc[^\n]*", "", body)
    token = re.compile(r"\s*(?:(\$?[\w$]+):(?!:)|([{}])|([^;{}]*(?:\{[^}]*\}[^;{}]*)*);)")
    at, end = 0, len(body.rstrip())
    while at < end:
        found = token.match(body, at)
        if found is None:
            raise ValueError(f"no statement: {body[at : at + 80]!r}")
        label, brace, statement = found.groups()
        yield f"{label}:" if label else brace or " ".join(statement.split())
        at = found.end()


def _instruction(text: str) -> Instruction:
    guard, rest = None, text
    if found := re.match(r"@(!?)(%?\w+)\s+(.*)$", text):
        guard, rest = Register(found[2], found[1] == "!"), found[3]
    opcode, _, operands = rest.partition(" ")
    return Instruction(
        text, tuple(opcode.split(".")), tuple(map(_operand, _split(operands))), guard
    )


def _split(text: str) -> list[str]:
    """What commas separate, but for those in braces or brackets."""
    return [x.strip() for x in re.findall(r"(?:\[[^]]*\]|\{[^}]*\}|[^,\[{])+", text) if x.strip()]


def _operand(text: str) -> Operand:
    if text[0] == "{":
        return Vector(tuple(_operand(x) for x in _split(text[1:-1])))
    if text[0] == "[":
        return _address(text[1:-1])
    if "|" in text:
        return Vector(tuple(_operand(x) for x in text.split("|")))
    if found := re.fullmatch(r"0[fdFD]([0-9a-fA-F]{8}|[0-9a-fA-F]{16})", text):
        return Immediate(int(found[1], 16))
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    if re.fullmatch(r"!?(%[\w.]+|_|[a-zA-Z]\d*|P\d+)", text):  # inline assembly names them p or s0
        return Register(text.lstrip("!"), text[0] == "!")
    return Symbol(text)


def _address(text: str) -> Address:
    base, *coordinates = _split(text)
    if coordinates:
        [vector] = map(_operand, coordinates)
        if not isinstance(vector, Vector):
            raise ValueError(f"[{text}]: coordinates in braces are expected")
        return Address(_operand(base), 0, vector.items)
    base, _, offset = base.partition("+")
    return Address(_operand(base.strip()), int(offset or 0))
