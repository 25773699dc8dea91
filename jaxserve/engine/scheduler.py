"""Decides, before each step, which tokens of which sequences it computes.

There is no prefill phase and no decode phase: a sequence has tokens that are known and tokens that
are computed, and a step moves the second number towards the first. Sequences that lack one token
(they decode) ride first, so that no prompt ever stalls them; prompts fill what is left of the token
budget, in chunks. Speculative sequences come last, in rows that a step's program would pad; they
make way for all others, and keep their pages while there is room.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxserve.cache.page_manager import PageManager, chain
from jaxserve.engine.sequence import Sequence


@dataclass(frozen=True)
class Limit:
    """What a feature has to say about the schedule.

    Attributes:
        applies: whether it concerns a sequence at all; asked once, when that arrives.
        most: how many of the next `count` tokens of the sequence may run now.
    """

    applies: Callable[[Sequence], bool]
    most: Callable[[Sequence, int], int]


@dataclass(slots=True)
class Row:
    """Tokens [start, start + count) of a sequence."""

    seq: Sequence
    start: int
    count: int
    samples: bool  # the row ends at the last known token, so the next one is drawn


class Group(NamedTuple):
    """Rows first to end of a step, whose tables begin with the same so many pages.

    No row of the group writes to those in this step.
    """

    first: int
    end: int
    pages: int


@dataclass(slots=True)
class Step:
    """What one launch computes; page copies come first.

    With `repeats` above 1 every row decodes, and the launch draws so many tokens for each.
    `groups` are found by the launch, which may put rows in another order; None where kernels know
    no groups.
    """

    rows: list[Row] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    num_tokens: int = 0
    repeats: int = 1
    pools: bool = False  # some row is of an embedding
    reads: bool = False  # some row draws nothing, and is no embedding's
    groups: list[Group] | None = None

    @property
    def decodes(self) -> bool:
        """Whether every row is one token, and the launch draws no more for any."""
        return self.num_tokens == len(self.rows) and self.repeats == 1

    @property
    def shared_pages(self) -> int:
        """Pages that rows of groups do not read again."""
        once = sum((g.end - g.first - 1) * g.pages for g in self.groups or ())
        return once * self.repeats


def wait_for_token(seq: Sequence, count: int) -> int:
    """A grammar must read a token before it can say what may follow."""
    return 0 if seq.in_flight else count


def stop_before_fork(seq: Sequence, count: int) -> int:
    """A prompt that several completions share is computed up to its last token, then forked."""
    if not seq.siblings or seq.prompt_len == 1:
        return count
    return min(count, seq.prompt_len - 1 - seq.computed) or count


LIMITS = (
    Limit(lambda seq: seq.matcher is not None, wait_for_token),
    Limit(lambda seq: bool(seq.siblings), stop_before_fork),
)


def _decodes_alone(row: Row) -> bool:
    """Whether the row's next tokens can be drawn without the host looking at each."""
    seq, p = row.seq, row.seq.params
    drawn = row.start + row.count - seq.prompt_len
    return (
        row.samples
        and row.count == 1
        and seq.matcher is None
        and seq.observed is None
        and p.logprobs is None
        and p.prompt_logprobs is None
        and drawn >= p.min_tokens
    )


class Scheduler:
    """Queues, pages and slots. Plain Python over integers.

    Args:
        fill: rows of the program for a step of so many; speculation may fill them.

    Attributes:
        ridge: rows up to which a step takes no longer with each: speculation may make a step so
            large, and not larger, where `fill` leaves nothing.
        reclaim: asked for pages when none are left, before anybody is preempted; False: it has
            none.
    """

    def __init__(
        self,
        pages: PageManager,
        max_num_seqs: int,
        limits: Seq[Limit] = LIMITS,
        *,
        prefix_caching: bool = True,
        fill: Callable[[int], int] = lambda rows: rows,
    ):
        self.pages = pages
        self.ridge = max_num_seqs
        self.reclaim: Callable[[], bool] = lambda: False
        self.waiting: deque[Sequence] = deque()
        self.speculative: deque[Sequence] = deque()  # those of them that wait
        self._fill = fill
        self.running: list[Sequence] = []
        self.held = False  # no request is begun; those that have been go on
        self.params_version = 0  # of the weights that requests are begun with
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._limits = limits
        self._prefix_caching = prefix_caching
        self._slots = list(range(max_num_seqs - 1, -1, -1))

    # ---- the three calls of the engine ------------------------------------------------

    def add(self, seq: Sequence) -> None:
        for each in (seq, *seq.siblings):
            each.limits = tuple(limit.most for limit in self._limits if limit.applies(each))
        self._queue(seq).append(seq)

    def _queue(self, seq: Sequence) -> deque[Sequence]:
        return self.speculative if seq.priority else self.waiting

    def promote(self, seq: Sequence) -> None:
        """Speculation is wanted after all. Whatever it has computed stays."""
        if seq.priority and not seq.finished:
            if seq.slot < 0:
                self.speculative.remove(seq)
                self.waiting.append(seq)
            seq.priority = 0

    def schedule(self, budget: int, max_rows: int | None = None) -> Step:
        """The next step, of at most `budget` tokens and `max_rows` sequences."""
        step = Step()
        room = len(self.running) + len(self._slots) if max_rows is None else max_rows
        prompts: list[Sequence] = []
        later: list[Sequence] = []
        for seq in list(self.running):
            if seq.priority:
                later.append(seq)
            elif len(seq.tokens) + seq.in_flight - seq.computed > 1:
                prompts.append(seq)
            elif seq.slot >= 0 and len(step.rows) < room:  # a victim of this very step has no slot
                self._decode(seq, step, budget)
        for seq in prompts:
            if seq.slot >= 0 and len(step.rows) < room:
                self._extend(seq, step, budget)
        while self.waiting and len(step.rows) < room and step.num_tokens < budget:
            if self.held and not self.waiting[0].begun:
                break
            if not (self._slots or self._park()) or not self._admit(self.waiting, step, budget):
                break
        if later or self.speculative:
            self._speculate(later, step, budget, room)
        return step

    def _speculate(self, later: list[Sequence], step: Step, budget: int, room: int) -> None:
        """Fills a step whose other rows are known."""
        room = min(room, max(self.ridge, self._fill(len(step.rows))))
        for seq in later:
            if seq.slot >= 0 and len(step.rows) < room:
                decodes = len(seq.tokens) + seq.in_flight - seq.computed == 1
                (self._decode if decodes else self._extend)(seq, step, budget)
        while self.speculative and len(step.rows) < room and step.num_tokens < budget:
            if self.held or not self._slots or not self._admit(self.speculative, step, budget):
                break

    def _park(self) -> bool:
        """Takes the slot of a speculative sequence, which keeps its pages; False: there is none."""
        for seq in reversed(self.running):
            if seq.priority:
                self.running.remove(seq)
                self._slots.append(seq.slot)
                seq.slot = -1
                seq.stay += 1
                self.speculative.appendleft(seq)
                return True
        return False

    @property
    def free_rows(self) -> int:
        """Rows that the program of a step of all that run would pad."""
        live = len(self.running)
        return max(self._fill(live) - live, 0)

    @property
    def num_queued(self) -> int:
        """Sequences that run or wait, those included that fork from one of them."""
        waiting = (*self.waiting, *self.speculative)
        return len(self.running) + sum(1 + len(seq.siblings) for seq in waiting)

    @property
    def num_begun(self) -> int:
        """Sequences of requests that have had a token computed: they run, or wait at the head."""
        waiting = (*self.waiting, *self.speculative)
        return len(self.running) + sum(seq.begun for seq in waiting)

    def repeat(self, step: Step, most: int) -> None:
        """Lets a step decode up to `most` tokens a row in one launch, if nobody needs the host
        between them and pages are there."""
        seqs = [row.seq for row in step.rows]
        queued = self.waiting or self.speculative
        if (queued and self._slots) or not all(_decodes_alone(row) for row in step.rows):
            return
        extra = min(most - 1, min((seq.max_len - seq.length for seq in seqs), default=0))
        need = [self._pages_for(seq.computed + extra) - len(seq.pages) for seq in seqs]
        if extra < 1 or sum(need) > self.pages.num_free:
            return
        step.repeats += extra
        for seq, count in zip(seqs, need, strict=True):
            seq.pages += self.pages.allocate(count)
            seq.computed += extra
            seq.in_flight += extra

    def finish(self, seq: Sequence) -> None:
        """Takes a sequence out, wherever it is. Its pages go to its `rest`, or stay matchable."""
        seq.finished = True
        if seq.rest is not None:
            seq.rest.take(seq)
        if seq.slot >= 0:
            self.running.remove(seq)
            self._leave(seq)
            return
        self.pages.release(seq.pages)
        seq.pages = []
        if seq in (queue := self._queue(seq)):
            queue.remove(seq)

    def distrust(self, seq: Sequence) -> None:
        """Gives up all that is cached of a sequence for which the model had no scores.

        The keys of tokens before the broken one may be NaN as well: a masked key weighs 0, and 0
        times NaN is NaN. Pages that it had matched go with them, since it may have met it there.
        """
        self.pages.withdraw(seq.keys)
        self._drop(seq)

    # ---- one sequence -----------------------------------------------------------------

    def _decode(self, seq: Sequence, step: Step, budget: int) -> None:
        """`_extend` by one token, short for the usual case: its page is there, and its own."""
        start = seq.computed
        page = start // self.pages.page_size
        if (
            seq.limits
            or seq.pooling is not None
            or seq.reads
            or page == len(seq.pages)
            or step.num_tokens == budget
            or not self.pages.is_writable(seq.pages[page], page < seq.published)
        ):
            self._extend(seq, step, budget)
        elif start < seq.max_len - 1:
            step.rows.append(Row(seq, start, 1, True))
            step.num_tokens += 1
            seq.computed = start + 1
            seq.in_flight += 1

    def _wanted(self, seq: Sequence, step: Step, budget: int) -> int:
        length = len(seq.tokens) + seq.in_flight
        if length >= seq.max_len and seq.computed >= seq.max_len - 1:
            return 0  # every token it may have is read or on its way
        count = min(length - seq.computed, budget - step.num_tokens)
        for limit in seq.limits:
            count = min(count, limit(seq, count))
        return count

    def _extend(self, seq: Sequence, step: Step, budget: int) -> None:
        """Adds a running sequence's next tokens, preempting later arrivals for their pages."""
        count = self._wanted(seq, step, budget)
        if count <= 0:
            return
        while not self._reserve(seq, count, step):
            if self._find_room(seq):
                continue
            victim = self._victim(seq, step)
            self._preempt(victim)
            if victim is seq:
                return
        self._append(seq, count, step)

    def _find_room(self, seq: Sequence) -> bool:
        """Gives pages back that nobody needs now: of a path that rests, of the last to wait, or of
        speculation that runs, if `seq` is none."""
        if self.reclaim():
            return True
        for other in (*reversed(self.speculative), *reversed(self.waiting)):
            if other.pages and other is not seq:
                self._drop(other)
                return True
        guess = next((s for s in reversed(self.running) if s.priority > seq.priority), None)
        if guess is not None:
            self._preempt(guess)
        return guess is not None

    def _victim(self, seq: Sequence, step: Step) -> Sequence:
        """The last to arrive of those that are not in this step; speculation goes first, and never
        takes from others."""
        in_step = {id(row.seq) for row in step.rows}
        others = (s for s in reversed(self.running) if id(s) not in in_step)
        return max((s for s in others if s.priority >= seq.priority), key=lambda s: s.priority)

    def _admit(self, queue: deque[Sequence], step: Step, budget: int) -> bool:
        """Starts the first that waits, behind what is cached of its prompt or what it brings."""
        seq = queue[0]
        if seq.in_flight:
            return False  # preempted with a token on its way, and its row on the device is gone
        brings = bool(seq.pages)
        if not brings:
            seq.pages = self._match(seq)
            self.pages.share(seq.pages)
            seq.computed, seq.published = len(seq.pages) * self.pages.page_size, len(seq.pages)
        count = self._wanted(seq, step, budget)
        while count > 0 and not self._reserve(seq, count, step):
            if not self._find_room(seq):
                count = 0
        if count <= 0:
            if not brings:
                self._drop(seq)
            return False
        queue.popleft()
        self._note_start(seq)
        seq.slot = self._slots.pop()
        self.running.append(seq)
        if self._prefix_caching and seq.uses_cache and not brings:
            self.prefix_queries += len(seq.tokens)
            self.prefix_hits += seq.computed
        self._append(seq, count, step)
        return True

    def _note_start(self, seq: Sequence) -> None:
        metrics = seq.generation.metrics
        if metrics.first_scheduled_time is None:  # a prefix hit after that is of the request's own
            metrics.first_scheduled_time = time.monotonic()
            metrics.params_version = self.params_version
            seq.generation.num_cached_tokens = seq.computed

    def _match(self, seq: Sequence) -> list[int]:
        """Cached pages of the prompt's beginning; its last token is always computed."""
        if not (self._prefix_caching and seq.uses_cache):
            return []
        self._extend_keys(seq, (len(seq.tokens) - 1) // self.pages.page_size)
        return self.pages.match(seq.keys[: (len(seq.tokens) - 1) // self.pages.page_size])

    def _extend_keys(self, seq: Sequence, count: int) -> None:
        size = self.pages.page_size
        for i in range(len(seq.keys), count):
            parent = seq.keys[i - 1] if i else seq.root
            seq.keys.append(chain(parent, seq.tokens[i * size : (i + 1) * size]))

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pages.page_size)

    def _reserve(self, seq: Sequence, count: int, step: Step) -> bool:
        """Pages of its own for the next `count` tokens; False if there are not enough."""
        first = seq.computed // self.pages.page_size
        copies = first < len(seq.pages) and not self.pages.is_writable(
            seq.pages[first], first < seq.published
        )
        need = self._pages_for(seq.computed + count) - len(seq.pages)
        if need + copies > self.pages.num_free:
            return False
        if copies:
            self._copy_on_write(seq, first, step)
        if need > 0:
            seq.pages += self.pages.allocate(need)
        return True

    def _copy_on_write(self, seq: Sequence, index: int, step: Step) -> None:
        old, (new,) = seq.pages[index], self.pages.allocate(1)
        step.copies.append((old, new))
        self.pages.release([old])
        seq.pages[index] = new

    def _append(self, seq: Sequence, count: int, step: Step) -> None:
        samples = seq.computed + count == seq.length and seq.samples
        step.rows.append(Row(seq, seq.computed, count, samples))
        step.num_tokens += count
        seq.computed += count
        seq.in_flight += samples
        step.pools |= seq.pooling is not None
        step.reads |= seq.reads
        if count > 1:  # a decoded token is published when it is read
            self.publish(seq)
        if seq.siblings and seq.computed >= seq.prompt_len - 1:
            self._fork_siblings(seq)

    def publish(self, seq: Sequence) -> None:
        """Enters full pages of known tokens into the index.

        That may happen before their step has run: whoever matches them runs in that step or later,
        and a step writes keys before it reads any.
        """
        full = min(seq.computed, len(seq.tokens)) // self.pages.page_size
        if not self._prefix_caching or full <= seq.published:
            return
        self._extend_keys(seq, full)
        for i in range(seq.published, full):
            self.pages.publish(seq.pages[i], seq.keys[i])
        seq.published = full

    # ---- fork and preempt ---------------------------------------------------------------

    def _fork_siblings(self, seq: Sequence) -> None:
        siblings, seq.siblings = seq.siblings, []
        for sibling in reversed(siblings):
            if self._slots and seq.computed == seq.prompt_len - 1:
                self.fork(seq, sibling)
            else:
                self.waiting.appendleft(sibling)  # the prefix index serves it later

    def fork(self, seq: Sequence, child: Sequence) -> None:
        """Starts `child` where `seq` is, on the same pages; whoever writes first copies."""
        self.pages.share(seq.pages)
        child.pages, child.computed = list(seq.pages), seq.computed
        child.keys, child.published = list(seq.keys), seq.published
        child.slot = self._slots.pop()
        self.running.append(child)
        self._note_start(child)

    def _preempt(self, seq: Sequence) -> None:
        """Back to the head of the queue; what is cached of it will be matched again."""
        self.num_preemptions += 1
        self.running.remove(seq)
        self._leave(seq)
        self._queue(seq).appendleft(seq)

    def _leave(self, seq: Sequence) -> None:
        self._drop(seq)
        self._slots.append(seq.slot)
        seq.slot = -1
        seq.stay += 1

    def _drop(self, seq: Sequence) -> None:
        self.pages.release(seq.pages)
        seq.pages, seq.computed, seq.published = [], 0, 0
