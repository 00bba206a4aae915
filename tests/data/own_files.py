"""120 files as users have them: 60 with a column that decides what a row means, and 60 whose additional columns do not.

The cases were written before anybody looked at the code that reads them, so they say what is right, not what it does.

    for case in MATTERS + HARMLESS:
        path = write(case, folder)     # one of ten forms of files: see FORMS
        control = without(case)        # the same rows without the columns: an ordinary file, which can be trained on

`case.expect` is "refused", "used or refused" or, for HARMLESS, "accepted". If a file with "used or refused" is
accepted, each text of `case.read` stands in the text of the examples (supervised or not), and nothing of
`case.untrained` (texts, or ids of tokens) is supervised. `case.fields` are the `fields` that the user sets where the
names are in another language.
"""

import csv
import gzip
import hashlib
import json
import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.own_contents import CODE, EXAM, GERMAN, PRESS, SIGHTS, SUPPORT, TASKS, TOOLS, Row


@dataclass(frozen=True)
class Case:
    """A file and what must happen to it. A column "messages[].weight" is a key of the objects in `messages`."""

    name: str
    form: str
    columns: tuple[str, ...]
    rows: list[Row]
    expect: str
    read: tuple[str, ...] = ()
    untrained: tuple[str | int, ...] = ()
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def file(self) -> str:
        return self.name + FORMS[self.form][0]


# ------------------------------------------------------------------------------------------------------- forms of rows


def pick(pool: list[Row], **names: str) -> list[Row]:
    """Return rows whose columns are `names`, each with a field of the pool: question="q"."""
    return [{name: record[key] for name, key in names.items()} for record in pool]


def qa(question: str = "question", answer: str = "answer", pool: list[Row] = SUPPORT) -> list[Row]:
    return pick(pool, **{question: "q", answer: "a"})


def chats(key: str = "messages", pool: list[Row] = SUPPORT) -> list[Row]:
    """Return OpenAI's form, every second chat with two exchanges."""
    rows = []
    for i, (one, two) in enumerate(zip(pool, pool[3:] + pool[:3], strict=True)):
        turns = [
            ("user", one["q"]),
            ("assistant", one["a"]),
            ("user", two["q"]),
            ("assistant", two["a"]),
        ]
        rows.append(
            {key: [{"role": role, "content": text} for role, text in turns[: 2 + i % 2 * 2]]}
        )
    return rows


def sharegpt() -> list[Row]:
    names = {"user": "human", "assistant": "gpt"}
    return [
        {
            "conversations": [
                {"from": names[turn["role"]], "value": turn["content"]} for turn in row["messages"]
            ]
        }
        for row in chats()
    ]


def seen_chats(mark: str, turns: str = "messages") -> list[Row]:
    """Return chats about a file, whose place in the text is `mark`."""
    keys = (
        ("role", "content", "user", "assistant")
        if turns == "messages"
        else ("from", "value", "human", "gpt")
    )
    return [
        {
            turns: [
                {keys[0]: keys[2], keys[1]: mark + sight["ask"]},
                {keys[0]: keys[3], keys[1]: sight["says"]},
            ]
        }
        for sight in SIGHTS
    ]


def blocks() -> list[Row]:
    """Return chats whose contents are lists of text blocks: Anthropic's form."""
    return [
        {
            "messages": [
                {**turn, "content": [{"type": "text", "text": turn["content"]}]}
                for turn in row["messages"]
            ]
        }
        for row in chats()
    ]


def texts(name: str = "text") -> list[Row]:
    return pick(PRESS, **{name: "text"})


def exam(letters: bool = False) -> list[Row]:
    return [
        {"question": e["ask"], "answer": e["right"] if letters else e[e["right"]]} for e in EXAM
    ]


PROMPT_IDS, ANSWER_IDS = range(20, 50), range(50, 100)


def token_rows(mask: str = "", seed: int = 5) -> list[Row]:
    """Return tokenised rows: a prompt of some ids, an answer of others, and a mask that is 1 in the answer."""
    draw = random.Random(seed)
    rows = []
    for _ in range(12):
        prompt, answer = (
            draw.sample(PROMPT_IDS, draw.randint(4, 12)),
            draw.sample(ANSWER_IDS, draw.randint(5, 20)),
        )
        row = {"input_ids": prompt + answer}
        rows.append({**row, mask: [0] * len(prompt) + [1] * len(answer)} if mask else row)
    return rows


def definition(name: str) -> Row:
    wanted = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
    return {"name": name, "description": f"Calls {name.replace('_', ' ')}.", "parameters": wanted}


def marked(key: str) -> list[Row]:
    """Return chats of two answers, of which a key says that the first, wrong one is not to be learnt."""
    return [
        {
            "messages": [
                {"role": "user", "content": one["q"]},
                {"role": "assistant", "content": one["worse"], key: 0},
                {"role": "user", "content": "That does not help me."},
                {"role": "assistant", "content": one["a"], key: 1},
            ]
        }
        for one in SUPPORT
    ]


DRAFT = "Unchecked draft of the night shift:"


def drafts() -> list[Row]:
    """Return Axolotl's spans inside an answer; an end_offset is the last character of its span."""
    rows = []
    for one in SUPPORT:
        text, border = f"{DRAFT} {one['a']}", len(DRAFT)
        spans = [(0, border - 1, False), (border, len(text) - 1, True)]
        detail = [
            {"begin_offset": begin, "end_offset": end, "train": train}
            for begin, end, train in spans
        ]
        answer = {"role": "assistant", "content": text, "train_detail": detail}
        rows.append({"messages": [{"role": "user", "content": one["q"]}, answer]})
    return rows


# ----------------------------------------------------------------------------------------------- columns that matter


def refused(
    name: str, form: str, rows: list[Row], fields: Row | None = None, **columns: Any
) -> Case:
    """Return a case with these columns. A value is the column's content, one item per row."""
    joined = [
        {**row, **{key: values[i] for key, values in columns.items()}} for i, row in enumerate(rows)
    ]
    return Case(name, form, tuple(columns), joined, "refused", fields=fields or {})


def used(
    name: str,
    form: str,
    rows: list[Row],
    fields: Row | None = None,
    read: Any = None,
    **columns: Any,
) -> Case:
    """Return a case that may also be accepted if the texts of these columns, or `read`, are in what is trained on."""
    case = refused(name, form, rows, fields, **columns)
    found = dict.fromkeys(text for text in read or strings(list(columns.values())) if text)
    return replace(case, expect="used or refused", read=tuple(found))


def masked(name: str, form: str, rows: list[Row], column: str, untrained: Any) -> Case:
    return Case(
        name, form, (column,), rows, "used or refused", untrained=tuple(dict.fromkeys(untrained))
    )


def strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, list | tuple)
        else ()
    )
    return [text for part in parts for text in strings(part)]


def col(key: str, pool: list[Row] = SUPPORT) -> list[Any]:
    return [record[key] for record in pool]


def each(make: Callable[[Any], Any], values: list[Any]) -> list[Any]:
    return [make(value) for value in values]


# fmt: off
FILES, PERSONAS, FACTS, WORSE = col("file", SIGHTS), col("persona"), col("facts"), col("worse")
LOOK = pick(SIGHTS, question="ask", answer="says")
CLAUSES, QUERIES = qa("Frage", "Antwort", GERMAN), pick(CODE, prompt="ask", completion="sql")
FRAGE = {"instruction": "Frage", "output": "Antwort"}
PNG = bytes.fromhex("89504e470d0a1a0a0000000d4948445200000001000000010806000000")
SAID = [[{"role": "user", "content": one["facts"]}, {"role": "assistant", "content": "Noted."}] for one in SUPPORT]
LONG_PACKS = [a["input_ids"] + b["input_ids"] for a, b in zip(token_rows(), token_rows(seed=6), strict=True)]
STARTS = [[*range(len(a["input_ids"])), *range(len(whole) - len(a["input_ids"]))] for a, whole in zip(token_rows(),
    LONG_PACKS, strict=True)]
SHOTS = [f"Q: {two['q']}\nA: {two['a']}" for two in SUPPORT[4:] + SUPPORT[:4]]
HERE, THERE = pick(PRESS, prompt="headline", completion="titre"), pick(PRESS, prompt="text", completion="translation")
MOVED = [row for pair in zip(HERE[::2], THERE[1::2], strict=True) for row in pair]
GRIDS = [{"header": ["item", "value"], "rows": [["order", fact], ["agent", lang]]} for fact, lang in zip(FACTS,
    col("lang"), strict=True)]
BETTER = [{"messages": [{"role": "user", "content": one["q"]}, {"role": "assistant", "content": one["a"]}]} for one in
    SUPPORT]

MATTERS = [
    # images, videos, sounds
    refused("factory_vqa", "jsonl", seen_chats("<image>"), images=each(lambda f: [f], FILES)),
    refused("factory_clips", "json", seen_chats("<video>", "conversations"), videos=each(lambda f: [f.rsplit(".")[0] +
        ".mp4"], FILES)),
    refused("swift_calls", "jsonl.gz", seen_chats("<audio>"), audios=each(lambda f: [f"s3://calls/{f[:-4]}.wav"],
        FILES)),
    refused("hub_pictures", "parquet", pick(SIGHTS, prompt="ask", completion="says"), images=each(lambda f: [{"bytes":
        PNG + f.encode(), "path": f}], FILES)),
    refused("llava_mix", "json", seen_chats("<image>\n", "conversations"), image=FILES),
    refused("radiology", "csv", LOOK, image_path=each("/data/pacs/{}".format, FILES)),
    refused("schadensbilder", "excel", CLAUSES, FRAGE, **{"Bild-URL": each("https://cdn.example.de/{}".format,
        col("bild", GERMAN))}),
    refused("screenshots", "columns", LOOK, screenshot_base64=each(lambda f: "iVBORw0KGgo" + f.encode().hex(), FILES)),
    refused("processed_pixels", "arrow", token_rows(), pixel_values=[[[[i / 12, 0.5], [0.1, 0.2]] for _ in range(3)]
        for i in range(12)]),
    # system prompts under other names
    used("helpdesk_2024", "jsonl", qa(), system_message=PERSONAS),
    used("hotel_bot", "csv", qa(), system_message=[PERSONAS[6]] * 10),
    used("vertex_tuning", "parquet", qa("prompt", "completion"), system_instruction=PERSONAS),
    used("characters", "csv.zst", qa("question", "response"), persona=PERSONAS),
    used("claude_export", "jsonl", blocks(), read=PERSONAS, system=each(lambda p: [{"type": "text", "text": p,
        "cache_control": {"type": "ephemeral"}}], PERSONAS)),
    used("bedrock_conversation", "json", chats(), system=each(lambda p: [{"text": p}], PERSONAS)),
    used("mieterverein", "excel", CLAUSES, FRAGE, Systemprompt=col("rolle", GERMAN)),
    used("roleplay", "arrow", sharegpt(), bot_profile=PERSONAS),
    # what the answer is taken from
    used("reading", "json", qa(), context=FACTS),
    used("retrieval", "csv", qa("query", "answer"), {"instruction": "query", "output": "answer"}, passage=FACTS),
    used("dolly_like", "jsonl", qa("instruction", "response"), context=FACTS),
    used("fact_check", "arrow", qa(), evidence=[[one["facts"], one["why"]] for one in SUPPORT]),
    used("wizard_dialogs", "jsonl.gz", chats(), knowledge=FACTS),
    used("vertragsfragen", "excel", CLAUSES, FRAGE, Vertragsklausel=col("klausel", GERMAN)),
    used("rag_logs", "json", qa("prompt", "completion"), retrieved_chunks=[[{"text": f, "rank": 1}] for f in FACTS]),
    used("kefu", "csv", qa("问题", "答案"), {"instruction": "问题", "output": "答案"}, 背景资料=FACTS),
    used("aide_client", "columns", qa("question", "réponse"), {"instruction": "question", "output": "réponse"},
        contexte=FACTS),
    used("clinic_notes", "parquet", qa(), patient_record=FACTS),
    used("table_questions", "jsonl", qa(), read=FACTS, table=GRIDS),
    used("text_to_sql", "csv.zst", QUERIES, db_schema=col("schema", CODE)),
    used("rewrite_requests", "tsv", pick(TASKS, instruction="instruction", output="output"), source_text=col("input",
        TASKS)),
    # a text beside what is to be said of it
    refused("newsroom_desks", "csv", texts(), category=col("topic", PRESS)),
    refused("reviews", "tsv", texts(), sentiment=col("tone", PRESS)),
    refused("utterances", "jsonl", pick(SUPPORT, text="q"), intent=col("topic")),
    refused("forum_posts", "parquet", texts(), **{"class": [2, 0, 1, 3, 2, 1, 0, 0]}),
    refused("indexed_articles", "arrow", texts(), topics=each(lambda t: [t, "news"], col("topic", PRESS))),
    refused("anfragen", "excel", pick(GERMAN, Text="q"), {"text": "Text"}, Kategorie=col("klasse", GERMAN)),
    refused("named_places", "jsonl.gz", texts(), entities=[[{"start": 0, "end": len(t.split()[1]), "label": k}] for t,
        k in zip(col("text", PRESS), col("topic", PRESS), strict=True)]),
    refused("headlines", "json", texts(), headline=col("headline", PRESS)),
    refused("parallel_news", "columns", texts(), translation=col("translation", PRESS)),
    refused("queries", "csv", pick(CODE, text="ask"), sql=col("sql", CODE)),
    refused("presse", "tsv", texts("texte"), {"text": "texte"}, titre=col("titre", PRESS)),
    refused("article_questions", "csv.zst", texts(), prompt=col("ask", PRESS)),
    # a second answer
    refused("swift_dpo", "jsonl", BETTER, rejected_response=WORSE),
    refused("swift_dpo_turns", "columns", BETTER, rejected_messages=each(lambda w: [{"role": "assistant", "content":
        w}], WORSE)),
    refused("arena", "csv.zst", qa("prompt", "response"), response_b=WORSE, winner=list("aabaabaaab")),
    refused("zweitmeinung", "excel", CLAUSES, FRAGE, **{"Antwort 2": col("zweite", GERMAN)}),
    # tools and choices
    used("old_functions", "jsonl", chats(), read=TOOLS, functions=[[definition(TOOLS[i % 7])] for i in range(10)]),
    used("agent_prompts", "arrow", qa("prompt", "completion"), read=TOOLS,
        available_tools=[json.dumps([definition(TOOLS[i % 7])]) for i in range(10)]),
    used("quiz", "csv", exam(letters=True), A=col("A", EXAM), B=col("B", EXAM), C=col("C", EXAM), D=col("D", EXAM)),
    used("licence_exam", "json", exam(), options=pick(EXAM, A="A", B="B", C="C", D="D")),
    # masks
    masked("trl_prepared", "jsonl", token_rows("completion_mask"), "completion_mask", PROMPT_IDS),
    masked("trl_assistant_only", "parquet", token_rows("assistant_masks"), "assistant_masks", PROMPT_IDS),
    refused("packed_batches", "arrow", [{"input_ids": pack} for pack in LONG_PACKS], position_ids=STARTS),
    masked("axolotl_spans", "json", drafts(), "messages[].train_detail", [DRAFT]),
    masked("openai_weights", "jsonl.gz", marked("weight"), "messages[].weight", WORSE),
    # the rest of the prompt, or of the answer
    used("follow_ups", "parquet", qa("instruction", "output"), read=FACTS, previous_turns=SAID),
    used("science_qa", "tsv", exam(), rationale=col("why", EXAM)),
    used("translators", "tsv", MOVED, target_language=["French", "German"] * 4),
    used("few_shot_tasks", "jsonl.gz", qa("instruction", "output"), examples=each(lambda s: [s], SHOTS)),
    used("sql_hints", "columns", QUERIES, hints=col("hint", CODE)),
]
# fmt: on


# ------------------------------------------------------------------------------------------ columns that do not matter

Make = Callable[[int], Any]
NAMES = ["a.kowalski", "m.dubois", "j.brandt", "li.wei", "s.okafor", "r.garcia"]
START = datetime(2024, 2, 27, 8, 15, tzinfo=UTC)


def one_of(*values: Any) -> Make:
    return lambda i: values[i * 5 % 7 % len(values)]


def number(first: int = 0, step: int = 1) -> Make:
    return lambda i: first + step * i


def code(pattern: str) -> Make:
    """Return numbers of tickets, orders and files: their order is not that of the rows."""
    return lambda i: pattern.format(10007 + i * 7919 % 50021)


def when(pattern: str) -> Make:
    return lambda i: (START + timedelta(hours=31 * i, seconds=i * i)).strftime(pattern)


def digest(i: int) -> str:
    return hashlib.sha256(f"row {i}".encode()).hexdigest()


def unique(i: int) -> str:
    return str(uuid.UUID(digest(i)[:32]))


def part(i: int) -> float:
    return round(0.31 + i * 37 % 61 / 100, 3)


def size(i: int) -> int:
    return 48 + i * 131 % 977


def moment(i: int) -> datetime:
    return START + timedelta(minutes=97 * i)


def floats(i: int) -> list[float]:
    draw = random.Random(i)
    return [round(draw.uniform(-1, 1), 6) for _ in range(16)]


def noted(**columns: Make) -> list[Row]:
    """Return chats whose messages have further keys."""
    return [
        {
            "messages": [
                {**turn, **{key: make(3 * i + k) for key, make in columns.items()}}
                for k, turn in enumerate(row["messages"])
            ]
        }
        for i, row in enumerate(chats())
    ]


def harmless(
    name: str, form: str, rows: list[Row], columns: dict[str, Make], fields: Row | None = None
) -> Case:
    joined = [
        {**{key: make(i) for key, make in columns.items()}, **row} for i, row in enumerate(rows)
    ]
    return Case(name, form, tuple(columns), joined, "accepted", fields=fields or {})


# fmt: off
PERSON, FLAG, NULL, EPOCH = one_of(*NAMES), one_of(True, False, True), one_of(None), number(1709021700, 86011)
ISO, DAY, PAGE = when("%Y-%m-%dT%H:%M:%SZ"), when("%Y-%m-%d"), code("https://help.example.com/articles/{}")
MODEL = one_of("gpt-4o", "claude-3-5-sonnet", "mistral-large-2407")
LANGUAGE, SPLIT = one_of("en", "de", "fr"), one_of("train", "train_sft")
LICENSE = one_of("cc-by-4.0", "mit", "apache-2.0")
ALPACA, PAIRS = pick(TASKS, **{k: k for k in TASKS[0]}), qa("prompt", "completion")
INSTRUCT = qa("instruction", "response")
BEDROCK = [{"messages": [{**turn, "content": [{"text": turn["content"]}]} for turn in row["messages"]]} for row in
    chats()]
HARMLESS = [
    harmless("faq", "jsonl", qa(), {"id": number(1)}),
    harmless("faq_uuid", "csv", qa(), {"uuid": unique}),
    harmless("notebook", "csv", qa(), {"Unnamed: 0": number()}),
    harmless("notebook_index", "csv.zst", INSTRUCT, {"": number()}),
    harmless("frame", "parquet", qa(), {"__index_level_0__": number(17, 3)}),
    harmless("mixture", "jsonl.gz", chats(), {"source": one_of("faq", "tickets", "wiki"), "dataset":
        one_of("support-v1", "oasst")}),
    harmless("crawled_answers", "tsv", qa(), {"url": PAGE, "score": size}),
    harmless("stamped", "arrow", qa(), {"created_at": moment}),
    harmless("ticketsystem", "excel", CLAUSES, {"Ticketnummer": code("TN-{}"), "Kundennummer": number(400118, 13)},
        FRAGE),
    harmless("mixed_languages", "json", ALPACA, {"lang": LANGUAGE, "split": SPLIT}),
    harmless("licensed", "columns", qa(), {"license": LICENSE, "author": PERSON}),
    harmless("counted", "csv.zst", PAIRS, {"version": one_of("1.0", "1.1"), "n_tokens": size}),
    harmless("hashed", "jsonl", texts(), {"sha256": digest}),
    harmless("synthetic", "jsonl", chats(), {"model": MODEL, "temperature": one_of(0.2, 0.7, 1.0)}),
    harmless("one_domain", "csv", qa(), {"task": one_of("question answering"), "domain": one_of("customer service")}),
    harmless("followed", "jsonl", chats(), {"tools": NULL, "olora_ray": lambda i: {"champion": "chats@7", "challenger":
        "chats@8", "answer": f"You can hand in your application number {i} until noon.", "finish_reason": "stop"}}),
    harmless("empty_columns", "parquet", INSTRUCT, {"notes": NULL, "reviewer_comment": NULL}),
    harmless("checked", "json", qa(), {"verified": FLAG, "is_duplicate": FLAG}),
    harmless("graded", "tsv", exam(), {"difficulty": part, "points": one_of(1, 2, 4)}),
    harmless("embedded", "parquet", texts(), {"embedding": floats}),
    harmless("clustered", "columns", qa(), {"cluster_id": one_of(4, 0, 11, 7)}),
    harmless("scans", "excel", CLAUSES, {"Dateiname": code("scan_{}.pdf"), "Erfasst am": when("%d.%m.%Y %H:%M")},
        FRAGE),
    harmless("openhermes_like", "json", sharegpt(), {"conversation_id": unique, "idx": number(), "views": NULL}),
    harmless("exported_chats", "jsonl", noted(id=unique, created_at=ISO), {}),
    harmless("api_answers", "json", noted(refusal=NULL, annotations=lambda i: []), {}),
    harmless("ultrachat_like", "arrow", chats(), {"prompt_id": digest}),
    harmless("fineweb_like", "parquet", texts(), {"id": lambda i: f"<urn:uuid:{unique(i)}>", "dump":
        one_of("CC-MAIN-2023-14", "CC-MAIN-2024-10"), "url": PAGE, "date": ISO, "file_path":
        code("s3://commoncrawl/crawl-data/{}.warc.gz"), "language": one_of("en"), "language_score": part,
        "token_count": size}),
    harmless("pile_like", "jsonl.gz", texts(), {"meta": lambda i: {"pile_set_name": one_of("Pile-CC", "PubMed")(i)}}),
    harmless("c4_like", "jsonl.gz", texts(), {"timestamp": ISO, "url": PAGE}),
    harmless("repositories", "parquet", pick(CODE, text="sql"), {"repo_name": one_of("acme/billing", "acme/shop",
        "li/etl"), "path": code("migrations/{}.sql"), "size": size, "max_stars_count": number(3, 17), "license":
        LICENSE}),
    harmless("oasst_like", "arrow", INSTRUCT, {"message_id": unique, "created_date": ISO, "review_count": one_of(3, 2,
        5), "deleted": one_of(False)}),
    harmless("arena_logs", "parquet", chats("conversation"), {"conversation_id": digest, "model": MODEL, "redacted":
        FLAG}, {"messages": "conversation"}),
    harmless("tokenised", "arrow", [{**row, "labels": list(row["input_ids"])} for row in token_rows()], {"length":
        size, "doc_id": code("doc-{}")}),
    harmless("zendesk", "csv", qa(), {"ticket_id": number(88213, 4), "assignee": PERSON, "created_at": ISO,
        "satisfaction_score": one_of(5, 4, 1)}),
    harmless("jira", "tsv", qa(), {"issue_key": code("HELP-{}"), "reporter": PERSON, "resolved_at": DAY}),
    harmless("salesforce", "csv.zst", qa(), {"CaseNumber": code("000{}"), "OwnerId": code("0058d00000{}AAG"),
        "LastModifiedDate": ISO}),
    harmless("hospital", "csv", qa(), {"study_id": code("ST{}"), "annotator_id": one_of(12, 7, 31), "agreement":
        part}),
    harmless("service_client", "columns", qa("question", "réponse"), {"numéro": number(301), "date_création":
        when("%d/%m/%Y"), "auteur": PERSON}, {"instruction": "question", "output": "réponse"}),
    harmless("kefu_jilu", "csv", qa("问题", "答案"), {"编号": code("KF{}"), "来源": one_of("微信", "电话", "网站"),
        "日期": DAY}, {"instruction": "问题", "output": "答案"}),
    harmless("atencion", "tsv", qa("pregunta", "respuesta"), {"fecha": when("%d/%m/%Y"), "fuente": one_of("correo",
        "chat")}, {"instruction": "pregunta", "output": "respuesta"}),
    harmless("kanzlei", "excel", CLAUSES, {"Aktenzeichen": code("7 C {}/23"), "Entscheidungsdatum": when("%d.%m.%Y")},
        FRAGE),
    harmless("bewertet", "excel", CLAUSES, {"Bewertung": one_of(4.5, 3.5, 5.0), "Geprüft": FLAG, "Bearbeiter": PERSON},
        FRAGE),
    harmless("evolved", "json", INSTRUCT, {"idx": number(), "complexity_score": part, "quality_score": part}),
    harmless("argilla", "arrow", qa(), {"_server_id": unique, "inserted_at": moment, "status": one_of("submitted")}),
    harmless("label_studio", "json", qa(), {"annotation_id": number(900), "lead_time": part, "completed_by": one_of(3,
        8), "updated_at": ISO}),
    harmless("distilled", "jsonl", INSTRUCT, {"generation_model": MODEL, "top_p": one_of(0.9, 0.95), "seed":
        number(1234)}),
    harmless("crowd", "csv.zst", qa(), {"WorkerId": code("A2KX{}QW"), "HITId": code("3BQU{}LM"), "WorkTimeInSeconds":
        size}),
    harmless("magpie_like", "parquet", INSTRUCT, {"uuid": unique, "input_length": size, "min_neighbor_distance":
        part}),
    harmless("commits", "jsonl.gz", QUERIES, {"commit": lambda i: digest(i)[:40], "author_email": lambda i:
        f"{PERSON(i)}@example.org"}),
    harmless("billing", "csv", PAIRS, {"prompt_tokens": size, "completion_tokens": size, "cost_usd": part,
        "latency_ms": size}),
    harmless("gateway_logs", "jsonl", chats(), {"request_id": lambda i: f"chatcmpl-{digest(i)[:24]}", "usage": lambda
        i: {"total_tokens": size(i)}, "finish_reason": one_of("stop")}),
    harmless("epoch_seconds", "columns", PAIRS, {"ts": EPOCH}),
    harmless("mailbox", "tsv", qa(), {"Message-ID": lambda i: f"<{digest(i)[:16]}@mail.example.com>", "received":
        DAY}),
    harmless("handbook_pages", "columns", texts(), {"page": number(4), "chunk_id": code("c-{}"), "file_name":
        one_of("handbook.pdf", "safety.pdf")}),
    harmless("books", "tsv", texts(), {"isbn": code("978-3-16-1{}-0"), "year": number(1971, 3)}),
    harmless("folds", "columns", ALPACA, {"row_nr": number(1), "fold": one_of(0, 1, 2)}),
    harmless("filtered", "csv.zst", texts(), {"pii_removed": FLAG, "nsfw": FLAG, "perplexity": part}),
    harmless("slack", "jsonl.gz", chats(), {"channel_id": code("C0{}ZK"), "thread_ts": lambda i:
        f"{EPOCH(i)}.000{i}19"}),
    harmless("bedrock_plain", "jsonl.gz", BEDROCK, {"schemaVersion": one_of("bedrock-conversation-2024")}),
    harmless("anthropic_plain", "arrow", blocks(), {"custom_id": code("req-{}")}),
    harmless("kundendienst", "excel", CLAUSES, {"Lfd. Nr.": number(1), "Quelle": one_of("Telefon", "E-Mail"),
        "Sprache": one_of("de")}, FRAGE),
]
# fmt: on
KEYS = {
    "exported_chats": ("messages[].id", "messages[].created_at"),
    "api_answers": ("messages[].refusal", "messages[].annotations"),
}
HARMLESS = [replace(case, columns=KEYS.get(case.name, case.columns)) for case in HARMLESS]


# ------------------------------------------------------------------------------------------------------ forms of files


def write(case: Case, folder: Path) -> Path:
    """Write the case's file, or folder of Arrow files, and return its path."""
    path = folder / case.file
    FORMS[case.form][1](case.rows, path)
    return path


def without(case: Case) -> Case:
    """Return the case without its columns."""
    top = {name for name in case.columns if "[]." not in name}
    inner = {tuple(name.split("[].")) for name in case.columns if "[]." in name}
    rows = [{key: value for key, value in row.items() if key not in top} for row in case.rows]
    for key, name in inner:
        rows = [
            {**row, key: [{k: v for k, v in turn.items() if k != name} for turn in row[key]]}
            for row in rows
        ]
    return replace(case, columns=(), rows=rows, expect="accepted", read=(), untrained=())


def cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def german_cell(value: Any) -> Any:
    """Return what a German Excel writes."""
    if isinstance(value, bool):
        return "WAHR" if value else "FALSCH"
    return str(value).replace(".", ",") if isinstance(value, float) else cell(value)


def frame(rows: list[Row]) -> pd.DataFrame:
    return pd.DataFrame([{key: cell(value) for key, value in row.items()} for row in rows])


def lines(rows: list[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_excel(rows: list[Row], path: Path) -> None:
    with path.open("w", encoding="cp1252", newline="") as file:
        out = csv.writer(file, delimiter=";", lineterminator="\r\n")
        out.writerows(
            [list(rows[0]), *([german_cell(value) for value in row.values()] for row in rows)]
        )


def write_tsv(rows: list[Row], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, "excel-tab")
        out.writerows([list(rows[0]), *([cell(value) for value in row.values()] for row in rows)])


FORMS: dict[str, tuple[str, Callable[[list[Row], Path], Any]]] = {
    "jsonl": (".jsonl", lambda rows, path: path.write_text(lines(rows), encoding="utf-8")),
    "jsonl.gz": (
        ".jsonl.gz",
        lambda rows, path: path.write_bytes(gzip.compress(lines(rows).encode())),
    ),
    "json": (".json", lambda rows, path: path.write_text(json.dumps(rows, indent=2))),
    "columns": (".json", lambda rows, path: pd.DataFrame(rows).to_json(path)),
    "csv": (".csv", lambda rows, path: frame(rows).to_csv(path, index=False)),
    "csv.zst": (
        ".csv.zst",
        lambda rows, path: frame(rows).to_csv(path, index=False, compression="zstd"),
    ),
    "excel": (".csv", write_excel),
    "tsv": (".tsv", write_tsv),
    "parquet": (".parquet", lambda rows, path: pq.write_table(pa.Table.from_pylist(rows), path)),
    "arrow": ("", lambda rows, path: datasets.Dataset.from_list(rows).save_to_disk(path)),
}
