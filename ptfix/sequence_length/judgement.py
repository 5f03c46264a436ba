"""What is wrong with training these rows on this model, in sentences with numbers and advice."""

from __future__ import annotations

from dataclasses import dataclass, field

from ptfix.sequence_length.context import Context
from ptfix.sequence_length.rows import Rows


@dataclass(frozen=True)
class Plan:
    """What a run is about to do."""

    context: Context  #: of the live config
    own: Context | None  #: of the checkpoint on disk, where there is one
    rows: Rows | None
    virtual_tokens: int = 0
    max_length: int | None = None
    max_length_is_promised: bool = False  #: the user told the guard, so rows of that length will come
    packed: bool | None = None  #: are several rows put into one of max_length? None: not known
    takes_every_row: bool = True  #: is the run long enough to train on each row?

    @property
    def longest(self) -> int:
        """The longest row to expect."""
        seen = self.rows.longest if self.rows is not None else 0
        return max(seen, self.max_length or 0) if self._open else seen

    @property
    def _open(self) -> bool:
        """May rows come that were not seen?"""
        return self.max_length_is_promised or self.rows is None or not self.rows.complete


@dataclass
class Judgement:
    """Sentences. Errors: the run is certain to crash or to learn nothing. Warnings: it may not learn what was meant."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def judge(plan: Plan) -> Judgement:
    """Judge a run by its numbers alone."""
    found = Judgement()
    _hard_table(plan, found)
    _trained_context(plan, found)
    _changed_rope(plan, found)
    _length_and_data(plan, found)
    _labels(plan, found)
    found.warnings += plan.context.faults
    if plan.context.boundary is not None and plan.longest + plan.virtual_tokens > plan.context.boundary:
        found.warnings += plan.context.doubts
    return found


def _hard_table(plan: Plan, found: Judgement) -> None:
    limit = plan.context.hard_limit
    if limit is None:
        return
    room = limit.value - plan.virtual_tokens
    adapter = f", {plan.virtual_tokens} of them taken by the adapter's virtual tokens" if plan.virtual_tokens else ""
    table = f"the model has a table of {limit.value} positions ({limit.source}){adapter}: "
    advice = f"Cut rows to {room} tokens (max_length={room})" if room > 0 else "No room is left for text"
    advice += ", or use fewer virtual tokens" if plan.virtual_tokens else ""
    seen = plan.rows.seen if plan.rows is not None else ()
    lengths = [row.width if plan.context.padding_counts else row.length for row in seen]
    longest = max(lengths, default=0)
    certain = plan.rows is not None and plan.rows.complete and (plan.takes_every_row or min(lengths) > room)
    promised = (plan.max_length or 0) if plan.max_length_is_promised else 0
    if promised > room or (longest > room and certain):
        found.errors.append(f"{table}rows of {max(longest, promised)} tokens end training with an error. {advice}")
    elif room <= 0:
        found.errors.append(f"{table}any row ends training with an error. {advice}")
    elif longest > room:
        share = sum(length > room for length in lengths) / len(lengths)
        found.warnings.append(
            f"{table}{share:.1%} of {plan.rows} have more, the longest {longest}; training ends with an error when it "
            f"comes to such a row. {advice}"
        )
    elif plan.max_length is not None and plan.longest > room:
        found.warnings.append(
            f"{table}max_length={plan.max_length} lets rows through that end training with an error, and not every "
            f"row could be looked at. {advice}"
        )


def _trained_context(plan: Plan, found: Judgement) -> None:
    trained = plan.context.train_mode_context
    if trained is None:
        return
    if (
        (found.errors or found.warnings)
        and plan.context.hard_limit is not None
        and plan.context.hard_limit.value <= trained.value
    ):
        return  # the table of positions has been spoken of, and is the same limit
    limit = trained.value - plan.virtual_tokens
    less = f" less {plan.virtual_tokens} virtual tokens" if plan.virtual_tokens else ""
    share = plan.rows.beyond(limit) if plan.rows is not None else 0.0
    declared = plan.context.declared_context
    but = f" (the {declared} that the config declares is for inference)" if declared and declared != trained else ""
    if share and plan.rows is not None:
        found.warnings.append(
            f"{share:.1%} of {plan.rows} are longer than {limit} tokens, the longest "
            f"{plan.rows.longest}; the model was trained on {trained}{less}{but}. Cut them (max_length={limit}), "
            "split them, or take a model with a longer context; to train beyond needs much long data"
        )
    elif plan.max_length is not None and plan.longest > limit:
        found.warnings.append(
            f"max_length={plan.max_length} is more than {limit} tokens; the model was trained on {trained}{less}{but}. "
            f"Set max_length={limit}, or take a model with a longer context"
        )


def _changed_rope(plan: Plan, found: Judgement) -> None:
    own, live = plan.own, plan.context
    if own is None:
        return
    before, now = own.train_mode_context, live.train_mode_context
    raised = before is not None and now is not None and now.value > before.value
    if live.rope.differs_from(own.rope):
        limit = None if before is None else before.value - plan.virtual_tokens
        share = "" if limit is None or plan.rows is None else f"; {plan.rows.beyond(limit):.1%} of rows are longer"
        found.warnings.append(
            f"the live rope ({live.rope}) is not the checkpoint's ({own.rope}), which was trained on {before}{share}. "
            "Short texts may read differently from step 0: scale only as far as the rows need"
        )
        if live.rope.scheme == "dynamic" and raised:
            found.warnings.append(
                f"dynamic rope scaling begins beyond {now}, which was raised from {before}: up to there it does "
                f"nothing. Set max_position_embeddings back to {before.value if before else ''}"
            )
    elif raised and before is not None and plan.longest > before.value - plan.virtual_tokens:
        found.warnings.append(
            f"the live config says {now}, the checkpoint was trained on {before}, and the rope is the same: a larger "
            "number alone teaches the model no longer positions"
        )


def _length_and_data(plan: Plan, found: Judgement) -> None:
    if plan.rows is None or plan.max_length is None:
        return
    most, cut = plan.rows.percentile(0.99), plan.rows.cut_at(plan.max_length)
    trained = plan.context.train_mode_context
    changed = plan.own is not None and plan.context.rope.differs_from(plan.own.rope)
    if cut > 0.9 and plan.packed is not False:
        cut = 0.0  # nearly all rows of one length were packed, not cut
    # A default of 1024 over short rows costs nothing; a length that was asked for, or scaled for, does.
    matters = plan.max_length_is_promised or changed or (trained is not None and plan.max_length > trained.value)
    if plan.max_length > 2 * most and matters and not plan.packed:
        found.warnings.append(
            f"max_length={plan.max_length} is {plan.max_length / max(1, most):.0f} times what the data needs: 99% of "
            f"{plan.rows} have at most {most} tokens, the longest {plan.rows.longest}. "
            "A length near that leaves the model's positions as they are"
        )
    if cut:
        found.warnings.append(
            f"{cut:.1%} of {plan.rows} end exactly at max_length={plan.max_length}: they were "
            "cut, most likely in the middle of an answer, which then has no end of turn. Split or drop such rows"
        )


def _labels(plan: Plan, found: Judgement) -> None:
    if plan.rows is None or not plan.rows.masked:
        return
    share = plan.rows.masked
    advice = (
        "look for answers cut away by max_length, and for a response template that the collator does not find in the "
        "tokens"
    )
    if share == 1 and plan.rows.complete:
        found.errors.append(f"nothing is trained on: all labels of all {plan.rows} are -100; {advice}")
    else:
        found.warnings.append(
            f"{share:.1%} of {plan.rows} train nothing, all their labels are -100 (a batch of them has the "
            f"loss NaN): {advice}"
        )
