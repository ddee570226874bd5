"""Users of two tenants talk, rate, learn, import, export and retire in any order: nobody is shown another's row.

Each episode, comment, document and imported example holds its own marker, and plain sets model which user may see it.
Every generated text repeats all markers in its prompt, as a careless language model would: an agent's answers, and the
insights of the critic, which reads comments as well. An operation is one call to the memory: an episode opened, a step,
an end, feedback, a correction, a retrieval, a decision, a removal, a round of learning, an import, an export, a read of
what an adapter is trained on.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from memory.config import MemoryConfig
from memory.datasets.examples import Origin
from memory.datasets.exports import ExportContent, ExportQuery
from memory.errors import IllegalMove, UnknownDocument, UnknownTrajectory
from memory.formats.content import ExampleContent, ExampleKind
from memory.records.insights import InsightOperation, OperationKind
from memory.records.reviews import Status
from memory.schema import Feedback, Scope, Split, Step, StepKind, Trajectory, TrajectoryStage, Trust, new_id
from memory.store import Memory
from optimizer.cycle.practice import learn_insights
from runtime.engine.cache_salts import CacheSalts
from tests.memory.episodes import HashingEncoder
from tests.optimizer.one_cycle import OneCycle

TENANTS, PERSONS = ("", "acme"), ("", "ann", "bob")
TOPICS = (
    "please fry the carrot on the stove",
    "when is the invoice due this month",
    "how is the weather in oslo today",
)
MARKER = re.compile(r"marker\d+")
CONFIG = MemoryConfig(
    retrieval_deadline_seconds=60,
    encoding_deadline_seconds=120,
    memory_tokens=100_000,
    max_insights=50,
    max_exemplars=4,
)
NUM_OPERATIONS: Counter[str] = Counter()

tenants, persons, topics = st.sampled_from(TENANTS), st.sampled_from(PERSONS), st.sampled_from(TOPICS)
keys = st.sampled_from(("none", "buttons", "tutor"))


@dataclass
class Marked:
    """The owner of one marker, and the other users who may see it."""

    tenant: str
    person: str
    is_everybodys: bool
    """True if it was practised, shared by its client, or approved by an operator."""
    seen_by: set[str] = field(default_factory=set)
    """Persons who were rightly shown it: their own episodes may repeat it to them."""

    def is_for(self, tenant: str, person: str) -> bool:
        is_theirs = person != "" and (person == self.person or person in self.seen_by)
        return tenant == self.tenant and (self.is_everybodys or is_theirs)


class Premises(RuleBasedStateMachine):
    """One memory, all its users, and a model of what each may see."""

    shares_live: ClassVar = False
    """Whether the operator lets each tenant see what its users live through."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="scopes-"))
        self.runner = asyncio.Runner()
        config = CONFIG.model_copy(update={"share_live": "tenant" if self.shares_live else "user"})
        self.memory = Memory.open(self.directory, config, encoder=HashingEncoder())
        self.salts = CacheSalts()
        self.marked: dict[str, Marked] = {}
        self.lived: list[tuple[Trajectory, str]] = []
        """Episodes with a good rating, and the topic of each."""
        self.keys: dict[str, str] = {}
        """Ids of API keys by name: one for rating buttons, one that may teach."""
        self.taught: set[str] = set()
        """Ids of the episodes and examples that weights may learn from."""
        self.retired_rows: set[str] = set()
        self.retired_words: set[tuple[str, str, str]] = set()
        """(tenant, person or "" for all, text)"""

    def teardown(self) -> None:
        self.memory.close()
        self.runner.close()
        shutil.rmtree(self.directory)

    def do(self, what: str, work: Any) -> Any:
        NUM_OPERATIONS[what] += 1
        return self.runner.run(work)

    def mark(self, tenant: str, person: str, is_everybodys: bool) -> str:
        marker = f"marker{len(self.marked)}"
        self.marked[marker] = Marked(tenant, person, is_everybodys)
        return marker

    def publish(self, text: str) -> None:
        """Record that an operator lets the whole tenant see this text."""
        for marker in MARKER.findall(text):
            self.marked[marker].is_everybodys = True

    @initialize(topics=st.lists(topics, min_size=4, max_size=4))
    def begin(self, topics: list[str]) -> None:
        """Start with some episodes, and an insight without a person, as older versions wrote it."""
        self.runner.run(self.memory.policies.register_base("pocket"))
        for name, scopes in (("buttons", [Scope.FEEDBACK]), ("tutor", [Scope.FEEDBACK, Scope.TEACH])):
            self.keys[name] = self.runner.run(self.memory.keys.create(name, scopes))[0].id
        for tenant, person, topic in zip(("", "", "acme", ""), ("ann", "bob", "ann", ""), topics, strict=True):
            self.live(tenant, person, topic, "live", True)
        words = f"from before {self.mark('', '', False)}"
        self.do("learn", self.memory.insights.apply([InsightOperation(OperationKind.ADD, "", "chat", words)]))

    @rule(tenant=tenants, person=persons, topic=topics)
    def talk(self, tenant: str, person: str, topic: str) -> None:
        self.live(tenant, person, topic, "live", True)

    @rule(
        tenant=tenants,
        person=persons,
        topic=topics,
        place=st.sampled_from(("live", "shared", "practice")),
        is_good=st.sampled_from((True, True, True, False)),
        key=keys,
    )
    def talk_or_practise(self, tenant: str, person: str, topic: str, place: str, is_good: bool, key: str) -> None:
        self.live(tenant, person, topic, place, is_good, key)

    def may_teach(self, tenant: str, key: str) -> bool:
        return key == "tutor" or (key == "none" and tenant == "")

    def live(self, tenant: str, person: str, topic: str, place: str, is_good: bool, key: str = "none") -> None:
        """Record an episode whose answer repeats all that memory shows, and rate it."""
        is_everybodys = place != "live"
        reader = "" if is_everybodys else person
        environment = "kitchen" if place == "practice" else None
        shown = self.ask(tenant, reader, topic, environment)
        marker = self.mark(tenant, person, is_everybodys)
        trajectory = Trajectory(
            id=new_id("trj"),
            tenant=tenant,
            user_id=person,
            is_shared=place == "shared",
            episode_id=new_id("eps"),
            environment=environment,
            kind="cooking" if environment else "chat",
            split=Split.PRACTICE if environment else Split.LIVE,
            task=new_id("task") if environment else None,
            task_text=f"{topic} {marker}",
            opening=[{"role": "user", "content": f"{topic} {marker}"}],
            policy=0,
        )
        trajectories = self.memory.trajectories
        self.do("open", trajectories.open(trajectory))
        # An exemplar shows the last 200 characters of a reply, on one line.
        answer = Step(
            trajectory_id=trajectory.id, position=0, kind=StepKind.MODEL, content=" ".join(shown.split())[-200:]
        )
        self.do("append", trajectories.append(answer, trajectory=trajectory))
        stage = TrajectoryStage.FINISHED
        self.do("close", trajectories.close(trajectory.id, stage=stage, answer=answer.content))
        said = Feedback(
            id="", tenant=tenant, trajectory_id=trajectory.id, value=is_good, user_id=person, key_id=self.keys.get(key)
        )
        kept, _ = self.do("feedback", self.memory.feedback.post(said))
        assert kept.user_id == person
        if self.may_teach(tenant, key):
            self.taught.add(trajectory.id)
        if is_good:
            self.lived.append((trajectory, topic))

    @rule(data=st.data(), person=persons, key=keys)
    @precondition(lambda self: self.lived)
    def comment(self, data: st.DataObject, person: str, key: str) -> None:
        """Comment on any episode: others may see the lesson only if the writer may teach."""
        trajectory, _ = self.lived[data.draw(st.integers(0, len(self.lived) - 1))]
        self.say("comment", "", trajectory, person, key)

    def say(self, field: str, before: str, trajectory: Trajectory, person: str, key: str) -> None:
        """Post words on an episode: others may see them only if the writer may teach."""
        is_everybodys = trajectory.is_shared or trajectory.environment is not None
        writer = person or trajectory.user_id
        is_public = is_everybodys and self.may_teach(trajectory.tenant, key) and writer == trajectory.user_id
        words = before + self.mark(trajectory.tenant, writer, is_public)
        said = Feedback(
            tenant=trajectory.tenant,
            trajectory_id=trajectory.id,
            user_id=person,
            key_id=self.keys.get(key),
            **{field: words},
        )
        self.do(field, self.memory.feedback.post(said))

    @rule(data=st.data(), person=persons, key=keys)
    @precondition(lambda self: self.lived)
    def correct(self, data: st.DataObject, person: str, key: str) -> None:
        """Correct any episode's answer: its own person may see the words, all others only those of a teacher."""
        # whether it is still an exemplar depends on who corrected it
        trajectory, topic = self.lived.pop(data.draw(st.integers(0, len(self.lived) - 1)))
        self.say("correction", f"{topic} ", trajectory, person, key)

    @rule(data=st.data())
    @precondition(lambda self: self.lived)
    def change_ones_mind(self, data: st.DataObject) -> None:
        """Take a good rating back, after which the episode is no exemplar."""
        trajectory, _ = self.lived.pop(data.draw(st.integers(0, len(self.lived) - 1)))
        said = Feedback(id="", tenant=trajectory.tenant, trajectory_id=trajectory.id, value=False)
        self.do("feedback", self.memory.feedback.post(said))
        self.retired_rows.add(trajectory.id)
        if self.may_teach(trajectory.tenant, "none"):
            self.taught.add(trajectory.id)

    @rule(tenant=tenants, topic=topics)
    def read(self, tenant: str, topic: str) -> None:
        """Give a tenant's agent a document."""
        marker = self.mark(tenant, "", True)
        self.do("ingest", self.memory.documents.ingest(topic[:12], f"{topic} {marker}", tenant=tenant))

    @rule(tenant=tenants, data=st.data())
    def remove(self, tenant: str, data: st.DataObject) -> None:
        """Remove a document: its passages are never shown again."""
        if documents := self.memory.documents.select(tenant=tenant):
            document = data.draw(st.sampled_from(documents))
            self.retired_rows |= {passage.id for passage in self.passages(document.id, tenant)}
            self.do("remove", self.memory.documents.remove(document.id, tenant=tenant))

    @rule(tenant=tenants, data=st.data())
    @precondition(lambda self: self.lived)
    def look_up(self, tenant: str, data: st.DataObject) -> None:
        """Read rows by id and in lists: another tenant's are never found."""
        trajectory, _ = self.lived[data.draw(st.integers(0, len(self.lived) - 1))]
        NUM_OPERATIONS["look up"] += 4
        trajectories, documents = self.memory.trajectories, self.memory.documents
        if trajectory.tenant == tenant:
            assert trajectories.get(trajectory.id, tenant=tenant).id == trajectory.id
        else:
            with pytest.raises(UnknownTrajectory):
                trajectories.get(trajectory.id, tenant=tenant)
        told = [view.trajectory.task_text for view in trajectories.select(tenant=tenant, limit=20)]
        told += [row.text for document in documents.select(tenant=tenant) for row in self.passages(document.id, tenant)]
        told += [insight.text for insight in self.memory.insights.active(tenant=tenant)]
        others = [it for text in told for it in MARKER.findall(text) if self.marked[it].tenant != tenant]
        assert not others, (tenant, others)

    def passages(self, document_id: str, tenant: str) -> list[Any]:
        (other,) = set(TENANTS) - {tenant}
        with pytest.raises(UnknownDocument):
            self.memory.documents.passages(document_id, tenant=other)
        return self.memory.documents.passages(document_id, tenant=tenant)

    @rule(tenant=tenants, topic=topics, key=keys, trust=st.sampled_from(Trust))
    def bring(self, tenant: str, topic: str, key: str, trust: Trust) -> None:
        """Import an example: no prompt ever shows it."""
        marker = self.mark(tenant, "", False)
        content = ExampleContent(
            ExampleKind.DEMONSTRATION,
            [{"role": "assistant", "content": f"{topic} {marker}"}],
            prompt=[{"role": "user", "content": f"{topic} {marker}"}],
        )
        origin = Origin(tenant=tenant, key_id=self.keys.get(key), trust=trust, source="file", format="trl")
        self.do("import", self.memory.examples.add([content], origin))
        if self.may_teach(tenant, key) and trust is Trust.TRUSTED:
            self.taught.add(self.memory.examples.select(tenant=tenant, limit=1)[0].id)

    @rule(tenant=tenants, content=st.sampled_from(ExportContent))
    def export(self, tenant: str, content: ExportContent) -> None:
        """Read all that a tenant can export: every row is its own."""
        NUM_OPERATIONS["export"] += 1
        told = [str(row) for page in self.memory.exports.read(ExportQuery(content, tenant)) for row in page]
        others = [it for text in told for it in MARKER.findall(text) if self.marked[it].tenant != tenant]
        assert not others, (tenant, content, others)

    @rule()
    def train(self) -> None:
        """Read what an adapter, which serves all tenants, is trained on: what those gave who may teach, and no more."""
        NUM_OPERATIONS["train"] += 2
        kind = ExampleKind.DEMONSTRATION
        read = {each.trajectory.id for each in self.memory.trajectories.learnable(is_for_weights=True)}
        read |= {each.example.id for each in self.memory.examples.learnable(kind, environments=[""], limit=10_000)}
        assert read == self.taught, read ^ self.taught

    @rule(tenant=tenants)
    def salt(self, tenant: str) -> None:
        """Check that tenants do not share a salt of the engine's cache."""
        NUM_OPERATIONS["salt"] += 1
        mine = self.salts.for_tenant(tenant)
        assert mine == self.salts.for_tenant(tenant)
        assert all(self.salts.for_tenant(other) != mine for other in TENANTS if other != tenant)

    @rule()
    def learn(self) -> None:
        """Extract insights with a critic that copies every marker it reads."""

        async def complete(messages: list[dict[str, Any]], **_: Any) -> str:
            told = list(dict.fromkeys(MARKER.findall(messages[-1]["content"])))[:12]
            return f"ADD: remember {' '.join(told)}\nEDIT 1: better {' '.join(told)}" if told else "NOTHING"

        self.do("learn", learn_insights(OneCycle(self.memory, complete)))

    @rule(tenant=tenants, data=st.data(), is_reworded=st.booleans())
    def approve(self, tenant: str, data: st.DataObject, is_reworded: bool) -> None:
        """Approve one memory for the whole tenant, as it is or reworded."""
        reviews = self.memory.reviews
        words = f"the operator says {self.mark(tenant, '', True)}" if is_reworded else None
        insights = reviews.insights(tenant=tenant, status=Status.PENDING)
        exemplars = reviews.exemplars(tenant=tenant, status=Status.PENDING)
        NUM_OPERATIONS["list"] += 2
        if insights and (not exemplars or data.draw(st.booleans())):
            row = data.draw(st.sampled_from([each.insight for each in insights]))
            try:
                approved = self.do("approve", reviews.approve_insight(row.id, tenant=tenant, text=words))
            except IllegalMove:  # this text was retired
                return
            self.publish(approved.text)
        elif exemplars:
            row = data.draw(st.sampled_from(exemplars))
            shown = self.do("approve", reviews.approve_exemplar(row.trajectory.id, tenant=tenant, text=words))
            self.publish(shown.text)

    @rule(tenant=tenants, data=st.data())
    def edit(self, tenant: str, data: st.DataObject) -> None:
        """Reword a memory as an operator; its scope stays the same."""
        reviews = self.memory.reviews
        insights, exemplars = reviews.insights(tenant=tenant), reviews.exemplars(tenant=tenant)
        NUM_OPERATIONS["list"] += 2
        if insights and (not exemplars or data.draw(st.booleans())):
            row = data.draw(st.sampled_from(insights))
            marker = self.mark(tenant, row.scope or "", row.scope == "")
            assert (
                self.do("edit", reviews.edit_insight(row.insight.id, f"edited {marker}", tenant=tenant)).scope
                == row.scope
            )
        elif exemplars:
            shown = data.draw(st.sampled_from(exemplars))
            marker = self.mark(tenant, shown.scope or "", shown.scope == "")
            change = reviews.edit_exemplar(shown.trajectory.id, f"edited {marker}", tenant=tenant)
            try:
                assert self.do("edit", change).scope == shown.scope
            except IllegalMove:  # it was corrected
                return

    @rule(tenant=tenants, data=st.data())
    def retire(self, tenant: str, data: st.DataObject) -> None:
        """Retire a memory for good, as an operator."""
        reviews = self.memory.reviews
        insights, exemplars = reviews.insights(tenant=tenant), reviews.exemplars(tenant=tenant)
        NUM_OPERATIONS["list"] += 2
        if insights and (not exemplars or data.draw(st.booleans())):
            row = data.draw(st.sampled_from(insights)).insight
            self.do("retire", reviews.retire_insight(row.id, tenant=tenant))
            self.retired_rows.add(row.id)
            self.retired_words.add((tenant, row.user_id, row.text))
        elif exemplars:
            trajectory = data.draw(st.sampled_from(exemplars)).trajectory
            self.do("retire", reviews.retire_exemplar(trajectory.id, tenant=tenant))
            self.retired_rows.add(trajectory.id)
            self.lived = [each for each in self.lived if each[0].id != trajectory.id]

    @rule()
    def settle(self) -> None:
        """Drain the index; then all users find their own exemplars."""
        self.do("drain", self.memory.index.drain())
        for trajectory, topic in self.lived[-6:]:
            environment = trajectory.environment
            if environment is None and not trajectory.is_shared and trajectory.user_id == "":
                continue
            shown = self.ask(trajectory.tenant, "" if environment else trajectory.user_id, topic, environment)
            assert "Solved before:" in shown, (trajectory.id, topic)

    @rule()
    @precondition(lambda self: len(self.marked) > 8)
    def rebuild(self) -> None:
        self.do("rebuild", self.memory.index.rebuild())

    @invariant()
    def nobody_is_shown_what_is_not_theirs(self) -> None:
        """Query as every user, however far the index has caught up."""
        for topic in TOPICS[:1] if len(self.marked) % 2 else TOPICS[1:2]:
            for tenant in TENANTS:
                for person in PERSONS:
                    self.ask(tenant, person, topic, None)
                self.ask(tenant, "", topic, "kitchen")

    def is_for(self, marked: Marked, tenant: str, person: str) -> bool:
        return marked.is_for(tenant, person)

    def ask(self, tenant: str, person: str, topic: str, environment: str | None) -> str:
        """Return the text that memory shows to a user, after checking that they may see all of it."""
        found = self.do(
            "retrieve",
            self.memory.retrieval.retrieve(
                environment=environment,
                kind="cooking" if environment else "chat",
                query_text=topic,
                tenant=tenant,
                user_id=person,
            ),
        )
        leaked = [it for it in MARKER.findall(found.text) if not self.is_for(self.marked[it], tenant, person)]
        assert not leaked, (tenant, person, leaked, found.text)
        assert not self.retired_rows & set(found.ids), "a retired memory was shown"
        lines = {line.removeprefix("- ") for line in found.text.splitlines() if line.startswith("- ")}
        of_all, of_one = ({words for *of, words in self.retired_words if of == [tenant, it]} for it in ("", person))
        assert not lines & of_all, "words were shown that are retired for all"
        if lines & of_one:  # retired for this person; an insight of the whole tenant may have the same text
            of_one -= {row.text for row in self.memory.insights.active(tenant=tenant, user_id="")}
        assert not lines & of_one, "words were shown that are retired for one person"
        if person:
            for marker in MARKER.findall(found.text):
                self.marked[marker].seen_by.add(person)
        return found.text


class OpenPremises(Premises):
    """The same where an operator chose `memory.share_live = "tenant"`."""

    shares_live = True

    def is_for(self, marked: Marked, tenant: str, person: str) -> bool:
        return marked.tenant == tenant


def run(num_examples: int, num_steps: int, machine: type[Premises] = Premises) -> None:
    """Run random histories, each with its own memory."""
    how = settings(
        max_examples=num_examples,
        stateful_step_count=num_steps,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    run_state_machine_as_test(machine, settings=how)


@pytest.mark.parametrize("machine", [Premises, OpenPremises])
def test_no_history_shows_a_person_what_is_anothers(machine: type[Premises]) -> None:
    run(num_examples=4, num_steps=15, machine=machine)


FULL_COUNT = 1_000_000


@pytest.mark.slow
@pytest.mark.timeout(24 * 3600)
def test_no_history_of_a_million_operations_shows_a_person_what_is_anothers() -> None:
    NUM_OPERATIONS.clear()
    began = time.monotonic()
    while NUM_OPERATIONS.total() < FULL_COUNT:
        run(num_examples=18, num_steps=40)
        run(num_examples=2, num_steps=40, machine=OpenPremises)
        print(f"{NUM_OPERATIONS.total()} operations in {time.monotonic() - began:.0f} s", flush=True)
    print(f"{NUM_OPERATIONS.total()} operations: {dict(NUM_OPERATIONS)}")
