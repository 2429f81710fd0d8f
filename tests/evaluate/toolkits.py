"""Our rules against the toolkits' own code, of lmms-eval and VLMEvalKit (as `ms-vlmeval`), on made answers.

`make test-scorers` runs it in an environment that has both. Their modules are imported one by one, since the packages
import all models; nothing of them is replaced but `random.choice`, which draws an option where an answer names none: it
returns none here, as under our rules.
"""

import importlib
import importlib.util
import json
import os
import random
import sys
import types
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_jax.evaluate import rule_options as options
from llava_jax.evaluate import rule_texts as texts
from llava_jax.evaluate.answers import Answer
from llava_jax.evaluate.benchmarks import BENCHMARKS, mmbench, mme, pope, vqa
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.rules import LMMS, OFFICIAL, VLMEVAL

os.environ.setdefault("OPENAI_API_KEY", "none")  # modules with judges make a client when they are imported
RUNS = settings(max_examples=int(os.environ.get("EXAMPLES", "300")), deadline=None, derandomize=True,
                suppress_health_check=list(HealthCheck))  # fmt: skip


def lmms(name: str) -> Any:
    return importlib.import_module(f"lmms_eval.{name}")


def vlmeval(name: str) -> Any:
    """A module of VLMEvalKit, whose packages' `__init__`, which import all data sets, are not run."""
    if "vlmeval" not in sys.modules:
        root = Path(importlib.util.find_spec("vlmeval").submodule_search_locations[0])
        for package in ("vlmeval", "vlmeval.dataset", "vlmeval.dataset.utils", "vlmeval.utils"):
            module = types.ModuleType(package)
            module.__path__ = [str(root.joinpath(*package.split(".")[1:]))]
            sys.modules[package] = module
        matching = importlib.import_module("vlmeval.utils.matching_util")
        own = {name: getattr(matching, name) for name in ("can_infer", "can_infer_lego")}
        own["track_progress_rich"] = importlib.import_module("vlmeval.utils.mp_util").track_progress_rich
        vars(sys.modules["vlmeval.utils"]).update(own)
    return importlib.import_module(f"vlmeval.{name}")


@pytest.fixture(autouse=True)
def draw_no_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "choice", lambda options: "")


OPTIONS = ("a red dog", "Cat", "12 cm", "none of them")
PIECES = [
    "A", "B", "C", "D", "E", "Z", "a", "b", "(A)", "(B)", "(C)", "A.", "B.", "B:", "C)", "D,", "The answer is",
    "Answer:", "Answer: B", "answer is", "so", "could be", "=", "I think", "because", "Dog", "Both", "A dog",
    "Cat", "a red dog",
    "none of them", "12 cm", "12", "12.5", "-3", "1,200", "1e3", "1,2", "50%", ".5", "yes", "no", "Yes,", "No.", "not",
    "Sorry, I can't help with images of people yet.", "Cannot determine the answer", "选", "is", "final", "result", "*",
    "one", "the", "don't", "dont", "!", "?", "'", '"', ";", "/", "it's", "Failed to obtain answer via API.",
    "\\frac{1}{2}",
]  # fmt: skip
SPACES = ["", " ", " ", " ", "  ", "\n", ". ", ", "]
WORDS = st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(SPACES)), min_size=1, max_size=9)
ANSWERS = WORDS.map(lambda pieces: "".join(a + b for a, b in pieces)) | st.text(min_size=1, max_size=30)
ANSWERS = ANSWERS.filter(str.strip)
LETTERED = dict(zip("ABCD", OPTIONS, strict=True))


@RUNS
@given(text=ANSWERS)
def test_option_letters(text: str):
    extract = lmms("tasks._task_utils.mcq_extract").extract_mcq_answer
    assert options.lmms_eval(text, list("ABCD"))[0] == extract(text, list("ABCD"))
    mmmu = lmms("tasks._task_utils.mmmu_mcq_utils").parse_mmmu_multi_choice_response
    assert options.mmmu(text, LETTERED, words=False)[0] == mmmu(text, list(LETTERED), LETTERED)
    assert options.vlmevalkit(text, LETTERED)[0] == (
        vlmeval("utils.matching_util").can_infer(text, dict(LETTERED)) or ""
    )
    mmbench = lmms("tasks.mmbench.mmbench_evals").MMBench_Evaluator()
    assert options.mmbench_lmms(text, LETTERED)[0] == (mmbench.can_infer(text, dict(LETTERED)) or "")
    filters = lmms("tasks.ai2d.utils").MultiChoiceRegexFilter(regex_pattern=r"([A-Z])\.")
    exact = lmms("api.metrics").exact_match_hf_evaluate
    (said,) = filters.apply([[text]], [{}])
    for letter in LETTERED:
        right = exact([said], [letter], ignore_case=True, ignore_punctuation=True)["exact_match"]
        assert (options.ai2d(text, LETTERED)[0] == letter) == right
    science = lmms("tasks.scienceqa.utils").sqa_process_results
    for number, letter in enumerate(LETTERED):
        right = science({"choices": OPTIONS, "answer": number}, [text])["exact_match"]
        assert (options.scienceqa_lmms(text)[0] == letter) == right


@RUNS
@given(text=ANSWERS, right=ANSWERS, more=st.lists(ANSWERS, max_size=2))
def test_short_answers(text: str, right: str, more: list[str]):
    mmmu, vqa = lmms("tasks.mmmu.utils"), vlmeval("dataset.utils.vqa_eval")
    for wanted in ([right], [right, *more]):
        assert texts.mmmu_open(text, wanted).score == mmmu.eval_open(wanted, mmmu.parse_open_response(text))
    assert texts.relaxed(text, right).score == lmms("tasks.chartqa.utils").relaxed_correctness(text, right)
    assert texts.relaxed(text, right).score == vqa.relaxed_correctness(right, text)
    wanted = [right, *more]
    assert texts.anls(text, wanted).score == lmms("api.metrics").anls(wanted, [text])["anls"]
    ((hit,),) = [vqa.hit_calculate([{"match": [vqa.anls_compute(one, text) for one in wanted]}], "DocVQA_VAL")]
    assert texts.anls(text, wanted).score == hit
    assert texts.vqa_words(text) == vqa.process_answer(text)
    assert {"yes": "Yes", "no": "No", None: "Unknown"}[texts.yes_or_no(text)] == (
        vlmeval("dataset.utils.yorn").YOrN_Extraction(text)
    )


# ---------------------------------------------------------------------------------------------------------- prompts


class Yaml(yaml.SafeLoader):
    """Reads the tasks of lmms-eval, whose functions are names."""


Yaml.add_constructor("!function", lambda loader, node: [node.value])
EXAM = {"question": "Is <image 1> it? ", "options": "['x', 'y']", "answer": "A", "question_type": "multiple-choice"}
MATH = {"pid": "1", "question": "How long?", "answer": "1.2", "unit": "cm", "precision": 2.0, "choices": None,
        "question_type": "free_form", "answer_type": "float", "query": "Hint: ?", "metadata": {}}  # fmt: skip
ASKED = [
    ("mmmu", "mmmu/mmmu_val", EXAM), ("mmmu-pro", "mmmu_pro/mmmu_pro_standard", EXAM),
    ("mmmu", "mmmu/mmmu_val", EXAM | {"options": "[]", "question_type": "open"}),
    ("mmmu-pro", "mmmu_pro/mmmu_pro_vision", {"options": "['x', 'y']", "answer": "A"}),
    ("mmstar", "mmstar/mmstar", {"question": " Which?\nOptions: A: x, B: y", "answer": "A", "l2_category": "c"}),
    ("ai2d", "ai2d/ai2d", {"question": "Which?", "options": ["x", "y"], "answer": "1"}),
    ("chartqa", "chartqa/chartqa", {"question": "How many?", "answer": "1", "type": "human_test"}),
    ("docvqa", "docvqa/docvqa_val", {"question": "Who?", "answers": ["x"], "questionId": "1"}),
    ("infovqa", "infovqa/infovqa_val", {"question": "Who?", "answers": ["x"], "questionId": "1"}),
    ("ocrbench", "ocrbench/ocrbench", {"question": " What? ", "answer": ["x"], "question_type": "t"}),
    ("mathvista", "mathvista/mathvista_testmini_format", MATH),
    ("mathvista", "mathvista/mathvista_testmini_format",
     MATH | {"choices": ["1", "2"], "answer_type": "text", "answer": "1", "question_type": "multi_choice"}),
    ("realworldqa", "realworldqa/realworldqa", {"question": " Is it?\nA. x\nB. y ", "answer": "A"}),
    ("hallusionbench", "hallusion_bench/hallusion_bench_image", {"question": "Is it?", "gt_answer": "1", "index": "a"}),
    ("wilder", "llava_wilder/llava_wilder_small", {"Question": "What?", "Answer": "It.", "question_id": "1"}),
]  # fmt: skip


@pytest.mark.parametrize("name,task,row", ASKED)
def test_prompts_of_lmms_eval(name: str, task: str, row: dict[str, Any]):
    folder = Path(importlib.util.find_spec("lmms_eval").submodule_search_locations[0]) / "tasks"
    config = yaml.load((folder / f"{task}.yaml").read_text(), Yaml)
    while "include" in config:
        config = yaml.load((folder / task).with_name(config.pop("include")).read_text(), Yaml) | config
    own = config.get("lmms_eval_specific_kwargs") or {}
    text, asked = config["doc_to_text"], own.get("default", own)
    if isinstance(text, list):
        module, function = text[0].rsplit(".", 1)
        text = getattr(lmms(f"tasks.{task.split('/')[0]}.{module}"), function)(row | {"hint": None}, asked)
    benchmark = BENCHMARKS[name]
    known = {column: cell for column, cell in row.items() if cell is not None}
    assert benchmark.prompts[LMMS](benchmark.item(Line("", known), 0)) == text


# ------------------------------------------------------------------------------------------------- whole benchmarks


def pairs_of(folder: Path, name: str, rows: list[dict[str, Any]], answers: list[str], replies: Any = None) -> list[Any]:
    """Answers with the labels that are in a file of these rows."""
    file = folder / "labels.json"
    file.write_text(json.dumps(rows))
    benchmark = BENCHMARKS[name]
    labels = benchmark.labels([item for item, _ in benchmark.read(str(file))], (), ())
    items = list(labels.values())
    if replies:
        items = [item._replace(reply=reply) for item, reply in zip(items, replies, strict=True)]
    return [(Answer(text, ""), item) for text, item in zip(answers, items, strict=True)]


def value(name: str, rule: str, pairs: list[Any], category: str | None = None) -> float | None:
    """The score with all digits, in all or of a category."""
    own = BENCHMARKS[name].rules[rule]
    terms = list(own.terms(own.cases(pairs)))
    return own.value([t for t in terms if (category in t.categories if category else t.headline)])


def draws(*columns: st.SearchStrategy, least: int = 2, most: int = 12) -> st.SearchStrategy:
    return st.lists(st.tuples(ANSWERS, *columns), min_size=least, max_size=most)


LETTER = st.sampled_from("ABCD")


@RUNS
@given(drawn=draws(LETTER, st.sampled_from(["Math", "Art", "Music"]), st.sampled_from(["12", "a red dog", "B", "1.5"]),
                   st.booleans()))  # fmt: skip
def test_mmmu(tmp_path: Path, drawn: Any):
    rows, answers = [], []
    for number, (text, letter, subject, right, is_open) in enumerate(drawn):
        kind = {"question_type": "open", "answer": right, "options": "[]"} if is_open else {
            "question_type": "multiple-choice", "answer": letter, "options": str(list(OPTIONS))}  # fmt: skip
        rows.append({"id": f"validation_{subject}_{number}", "question": "<image 1> ?"} | kind)
        answers.append(text)
    own = pairs_of(tmp_path, "mmmu", rows, answers)
    utils = lmms("tasks.mmmu.utils")
    results = [utils.mmmu_process_results(row, [text])["mmmu_acc"] for row, text in zip(rows, answers, strict=True)]
    assert round(value("mmmu", LMMS, own) / 100, 5) == utils.mmmu_aggregate_results(results)
    table = pd.DataFrame([
        {"index": i, "question": "?", "answer": row["answer"], "prediction": text, "category": row["id"].split("_")[1],
         **dict(zip("ABCD", OPTIONS if row["question_type"] != "open" else [None] * 4, strict=True))}
        for i, (row, text) in enumerate(zip(rows, answers, strict=True))
    ])  # fmt: skip
    assert value("mmmu", VLMEVAL, own) == pytest.approx(100 * vlmeval_choices(table, "MMMU_DEV_VAL"), rel=1e-12)


def vlmeval_choices(table: pd.DataFrame, name: str) -> float:
    """VLMEvalKit's accuracy without a judge: what `mcq_vanilla_eval` does with each row, in this process."""
    choice = vlmeval("dataset.utils.multiple_choice")
    table = table.copy()
    table["GT"] = table["answer"]
    if "MMMU" in name:
        table = choice.MMMU_preproc(table)
        table["GT"] = [right if right in [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ"] else "A" for right in table["answer"]]
    table["hit"] = [choice.eval_vanilla(None, table.iloc[i], name)["hit"] for i in range(len(table))]
    return choice.report_acc(table)["Overall"][0]


@RUNS
@given(drawn=draws(LETTER, st.booleans()))
def test_mmmu_pro(tmp_path: Path, drawn: Any):
    rows = [
        {"id": f"test_Art_{i}", "subject": "Art", "answer": letter, "options": str(list(OPTIONS))}
        | ({} if vision else {"question": "?"})
        for i, (_, letter, vision) in enumerate(drawn)
    ]
    answers = [text for text, *_ in drawn]
    own = pairs_of(tmp_path, "mmmu-pro", rows, answers)
    utils, official = lmms("tasks.mmmu_pro.utils"), []
    for kind in {pair[1].kind for pair in own}:
        some = [(row, text) for row, text, pair in zip(rows, answers, own, strict=True) if pair[1].kind == kind]
        results = [utils.mmmu_pro_process_results(row, [text])["mmmu_acc"] for row, text in some]
        official.append(utils.mmmu_pro_aggregate_results(results))
        assert round(value("mmmu-pro", LMMS, [pair for pair in own if pair[1].kind == kind]) / 100, 5) == official[-1]
    assert value("mmmu-pro", LMMS, own) == pytest.approx(100 * sum(official) / len(official), abs=1e-3)


AXES = [("math", "geometry"), ("math", "statistical reasoning"), ("coarse perception", "image emotion")]


@RUNS
@given(drawn=draws(LETTER, st.sampled_from(AXES)))
def test_mmstar(tmp_path: Path, drawn: Any):
    rows = [
        {"index": i, "question": "? Options: " + ", ".join(f"{x}: {o}" for x, o in LETTERED.items()), "answer": letter,
         "category": axis[0], "l2_category": axis[1]}
        for i, (_, letter, axis) in enumerate(drawn)
    ]  # fmt: skip
    answers = [text for text, *_ in drawn]
    own = pairs_of(tmp_path, "mmstar", rows, answers)
    utils = lmms("tasks.mmstar.utils")
    results = [utils.mmstar_process_results(row, [text]) for row, text in zip(rows, answers, strict=True)]
    assert value("mmstar", LMMS, own) == pytest.approx(
        100 * utils.mmstar_aggregate_results([result["average"] for result in results]), rel=1e-12
    )
    for category in {axis[0] for _, _, axis in drawn}:
        some = [result[category] for result in results if category in result]
        expected = 100 * utils.mmstar_aggregate_results(some)
        assert value("mmstar", LMMS, own, category) == pytest.approx(expected, rel=1e-12)
    table = pd.DataFrame([row | LETTERED | {"prediction": text} for row, text in zip(rows, answers, strict=True)])
    assert value("mmstar", VLMEVAL, own) == pytest.approx(100 * vlmeval_choices(table, "MMStar"), rel=1e-12)


@RUNS
@given(drawn=draws(st.sampled_from(["A", "B", "C", "2", "Downhill", "12"])))
def test_realworldqa(tmp_path: Path, drawn: Any):
    rows = [
        {"question": "?\n" + "\n".join(f"{x}. {o}" for x, o in LETTERED.items()), "answer": right} for _, right in drawn
    ]
    answers = [text for text, _ in drawn]
    own = pairs_of(tmp_path, "realworldqa", rows, answers)
    utils = lmms("tasks.realworldqa.utils")
    scores = [
        utils.realworldqa_process_results(row, [text])["exact_match"] for row, text in zip(rows, answers, strict=True)
    ]
    assert value("realworldqa", LMMS, own) == pytest.approx(100 * sum(scores) / len(scores), rel=1e-12)
    table = pd.DataFrame([row | LETTERED | {"index": i, "prediction": text} for i, (row, text) in
                          enumerate(zip(rows, answers, strict=True))])  # fmt: skip
    assert value("realworldqa", VLMEVAL, own) == pytest.approx(100 * vlmeval_choices(table, "RealWorldQA"), rel=1e-12)


@RUNS
@given(drawn=draws(ANSWERS, st.sampled_from(["human_test", "augmented_test"])))
def test_chartqa(tmp_path: Path, drawn: Any):
    rows = [{"question": "?", "answer": right, "type": kind} for _, right, kind in drawn]
    answers = [text for text, *_ in drawn]
    own = pairs_of(tmp_path, "chartqa", rows, answers)
    utils, vqa = lmms("tasks.chartqa.utils"), vlmeval("dataset.utils.vqa_eval")
    results = [utils.chartqa_process_results(row, [text]) for row, text in zip(rows, answers, strict=True)]
    scores = [result["relaxed_overall"] for result in results]
    assert value("chartqa", LMMS, own) == pytest.approx(100 * sum(scores) / len(scores), rel=1e-12)
    human = [result["relaxed_human_split"] for result in results if "relaxed_human_split" in result]
    assert value("chartqa", LMMS, own, "human") == pytest.approx(100 * sum(human) / len(human) if human else None)
    lines = [{"answer": row["answer"], "prediction": text} for row, text in zip(rows, answers, strict=True)]
    hits = vqa.hit_calculate([vqa.process_line(line, "relaxed_accuracy") for line in lines], "ChartQA_TEST")
    assert value("chartqa", VLMEVAL, own) == pytest.approx(100 * sum(hits) / len(hits), rel=1e-12)


@RUNS
@given(drawn=draws(st.lists(ANSWERS, min_size=1, max_size=3)))
def test_docvqa(tmp_path: Path, drawn: Any):
    rows = [{"questionId": i, "question": "?", "answers": right} for i, (_, right) in enumerate(drawn)]
    answers = [text for text, _ in drawn]
    own = pairs_of(tmp_path, "docvqa", rows, answers)
    vqa, metrics = vlmeval("dataset.utils.vqa_eval"), lmms("api.metrics")
    scores = [metrics.anls(row["answers"], [text])["anls"] for row, text in zip(rows, answers, strict=True)]
    assert value("docvqa", LMMS, own) == pytest.approx(100 * metrics.mean(scores), rel=1e-12)
    lines = [{"answer": str(row["answers"]), "prediction": text} for row, text in zip(rows, answers, strict=True)]
    hits = vqa.hit_calculate([vqa.process_line(line, "anls") for line in lines], "DocVQA_VAL")
    assert value("docvqa", VLMEVAL, own) == pytest.approx(100 * sum(hits) / len(hits), rel=1e-12)


@RUNS
@given(drawn=draws(st.lists(ANSWERS, min_size=1, max_size=2), st.booleans()))
def test_ocrbench(tmp_path: Path, drawn: Any, monkeypatch: pytest.MonkeyPatch):
    formula = "Handwritten Mathematical Expression Recognition"
    rows = [
        {"question": "?", "answer": right, "dataset": "HME100k" if hme else "svt",
         "question_type": formula if hme else "Regular Text Recognition"}
        for _, right, hme in drawn
    ]  # fmt: skip
    answers = [text for text, *_ in drawn]
    own = pairs_of(tmp_path, "ocrbench", rows, answers)
    utils = lmms("tasks.ocrbench.utils")
    scores = [
        utils.ocrbench_process_results(row, [text])["ocrbench_accuracy"]["score"]
        for row, text in zip(rows, answers, strict=True)
    ]
    assert value("ocrbench", LMMS, own) == sum(scores)
    file = tmp_path / "predictions.tsv"
    frame = pd.DataFrame([
        {"index": i, "prediction": text, "answer": str(row["answer"]), "category": row["question_type"]}
        for i, (row, text) in enumerate(zip(rows, answers, strict=True))
    ])  # fmt: skip
    module, found = vlmeval("dataset.utils.ocrbench"), []
    monkeypatch.setattr(module, "load", lambda path: frame)
    monkeypatch.setattr(module, "dump", lambda scores, path: found.append(scores))
    module.OCRBench_eval(str(file))
    assert value("ocrbench", VLMEVAL, own) == found[0]["Final Score"]


KINDS = [("multi_choice", "text", "Cat"), ("free_form", "integer", "12"), ("free_form", "float", "12.5"),
         ("free_form", "list", "[1, 2]")]  # fmt: skip


@RUNS
@given(drawn=draws(st.sampled_from(KINDS), st.sampled_from([1, 2, 1.0])))
def test_mathvista(tmp_path: Path, drawn: Any):
    """Replies of a judge are normalized as the toolkits do; what needs no judge is read as they do."""
    rows = [
        {"pid": str(i), "question": "?", "question_type": kind[0], "answer_type": kind[1], "answer": kind[2],
         "choices": list(OPTIONS) if kind[0] == "multi_choice" else None, "precision": precision}
        for i, (_, kind, precision) in enumerate(drawn)
    ]  # fmt: skip
    answers = [text for text, *_ in drawn]
    own = pairs_of(tmp_path, "mathvista", rows, ["?"] * len(rows), answers)
    evaluator, right = lmms("tasks.mathvista.mathvista_evals").MathVistaEvaluator(), 0
    for row, reply in zip(rows, answers, strict=True):
        args = (row["choices"], row["question_type"], row["answer_type"], row["precision"])
        right += evaluator.safe_equal(evaluator.normalize_extracted_answer(reply.strip(), *args), row["answer"])
    assert value("mathvista", LMMS, own) == pytest.approx(100 * right / len(rows), rel=1e-12)
    module, right = vlmeval("dataset.utils.mathvista"), 0
    for row, reply in zip(rows, answers, strict=True):
        line = row | {"choices": str(row["choices"]), "answer_option": "B", "prediction": "?", "res": reply}
        right += bool(module.post_check(line))
    assert value("mathvista", VLMEVAL, own) == pytest.approx(100 * right / len(rows), rel=1e-12)


@RUNS
@given(drawn=draws(st.sampled_from(["VD", "VS"]), st.integers(0, 1), st.integers(0, 2), st.integers(0, 1),
                   st.booleans(), st.sampled_from(["correct", "Incorrect.", "unclear", "?"])))  # fmt: skip
def test_hallusionbench(tmp_path: Path, drawn: Any, monkeypatch: pytest.MonkeyPatch):
    seen, rows, answers, replies = set(), [], [], []
    for text, category, set_id, figure, question, right, reply in drawn:
        key = (category, set_id, figure, question)
        if key in seen:
            continue
        seen.add(key)
        shown = "0" if category == "VS" and figure == 0 else "1"
        rows.append({"category": category, "subcategory": "chart", "set_id": str(set_id), "figure_id": str(figure),
                     "question_id": str(question), "question": "?", "gt_answer": str(int(right)),
                     "gt_answer_details": "!", "visual_input": shown})  # fmt: skip
        answers.append(text)
        replies.append(reply)
    utils = lmms("tasks.hallusion_bench.utils")
    judged = pairs_of(tmp_path, "hallusionbench", rows, answers, replies)
    names = {"correct": "1", "Incorrect.": "0", "unclear": "2", "?": "2"}
    data = [dict(row) | {"gpt": names[reply]} for row, reply in zip(rows, replies, strict=True)]
    data = utils.assign_correctness(data, "gpt")
    for category, stat in (("aAcc", utils.get_eval_all(data, "gpt")), ("qAcc", utils.get_eval_pair_all(data, "gpt"))):
        expected = 100 * stat["correct"] / stat["total"]
        assert value("hallusionbench", OFFICIAL, judged, category) == pytest.approx(expected, rel=1e-12)
    if any(row["visual_input"] != "0" for row in rows):
        stat = utils.get_eval_fig(data)
        expected = 100 * stat["correct"] / stat["total"]
        assert value("hallusionbench", OFFICIAL, judged, "fAcc") == pytest.approx(expected, rel=1e-12)
        plain = pairs_of(tmp_path, "hallusionbench", rows, answers)
        frame = pd.DataFrame([
            {"index": f"h_{row['category']}_chart_{row['set_id']}_{row['figure_id']}_{row['question_id']}",
             "l2-category": "chart", "score": vlmeval("dataset.utils.yorn").YOrN_Extraction(text)
             == ("Yes" if row["gt_answer"] == "1" else "No")}
            for row, text in zip(rows, answers, strict=True) if row["visual_input"] != "0"
        ])  # fmt: skip
        monkeypatch.setattr(vlmeval("dataset.utils.yorn"), "load", lambda path: frame)
        scores = vlmeval("dataset.utils.yorn").Hallusion_rating("")
        expected = sum(float(scores[name][0]) for name in ("aAcc", "fAcc", "qAcc")) / 3
        assert value("hallusionbench", VLMEVAL, plain) == pytest.approx(expected, rel=1e-12)


@RUNS
@given(reviews=st.lists(st.sampled_from(["10 8\nFine.", "10, 7", "9", "10 6.5", "8 8 8", "ten 5", "10  7"]), min_size=1,
                        max_size=9).filter(lambda reviews: {"10 8\nFine.", "10 6.5"} & set(reviews)))  # fmt: skip
def test_wilder(tmp_path: Path, reviews: list[str]):
    rows = [{"question_id": i, "Question": "?", "Answer": "!"} for i in range(len(reviews))]
    own = pairs_of(tmp_path, "wilder", rows, ["It is."] * len(rows), reviews)
    utils = lmms("tasks.llava_wilder.utils")
    expected = utils.llava_all_aggregation([{"scores": utils.parse_score(review)} for review in reviews])
    assert value("wilder", LMMS, own) == expected


# ------------------------------------------------------------------------------------------- benchmarks of the release


def labelled(label: Any, texts: list[str]) -> list[Any]:
    return [(Answer(text, str(number)), one) for number, (text, one) in enumerate(zip(texts, label, strict=True))]


@RUNS
@given(drawn=draws(st.booleans(), st.sampled_from(["random", "popular"])))
def test_pope(drawn: Any, monkeypatch: pytest.MonkeyPatch):
    own = labelled([pope.Label(sampling, present, "1.jpg") for _, present, sampling in drawn], [a for a, *_ in drawn])
    utils, yorn = lmms("tasks.pope.utils"), vlmeval("dataset.utils.yorn")
    docs = [{"answer": label.right, "question_id": i} for i, (_, label) in enumerate(own)]
    results = [utils.pope_process_results(d, [a.value])["pope_f1_score"] for d, (a, _) in zip(docs, own, strict=True)]
    assert (value("pope", LMMS, own) or 0.0) == pytest.approx(100 * utils.pope_aggregate_f1_score(results), rel=1e-12)
    frame = pd.DataFrame([
        {"category": label.category, "answer": label.right.capitalize(),
         "extracted": yorn.YOrN_Extraction(answer.value)}
        for answer, label in own
    ])  # fmt: skip
    frame["score"] = frame["answer"] == frame["extracted"]
    monkeypatch.setattr(yorn, "load", lambda path: frame)
    expected = yorn.POPE_rating("")["Overall"][0]
    assert (value("pope", VLMEVAL, own) or 0.0) == pytest.approx(expected, rel=1e-12)


@RUNS
@given(drawn=st.lists(st.tuples(ANSWERS, ANSWERS, st.sampled_from(["existence", "OCR", "code_reasoning"])), min_size=1,
                      max_size=8))  # fmt: skip
def test_mme(drawn: Any, monkeypatch: pytest.MonkeyPatch):
    labels = [mme.Label(name, str(i), right) for i, (*_, name) in enumerate(drawn) for right in ("yes", "no")]
    own = labelled(labels, [text for first, second, _ in drawn for text in (first, second)])
    utils, yorn = lmms("tasks.mme.utils"), vlmeval("dataset.utils.yorn")
    results = [
        utils.mme_process_results(
            {"answer": label.right, "category": label.category, "question_id": label.image}, [a.value]
        )
        for a, label in own
    ]
    for key, part in (("mme_perception_score", "perception"), ("mme_cognition_score", "cognition")):
        some = [result[key] for result in results if key in result]
        if some:
            assert value("mme", LMMS, own, part) == pytest.approx(utils.mme_aggregate_results(some), rel=1e-12)
    frame = pd.DataFrame(
        [
            {
                "category": label.category,
                "image_path": label.image,
                "score": yorn.YOrN_Extraction(answer.value).lower() == label.right,
            }
            for answer, label in own
        ]
    )
    monkeypatch.setattr(yorn, "load", lambda path: frame)
    scores = yorn.MME_rating("")
    expected = float(scores["perception"][0]) + float(scores["reasoning"][0])
    assert value("mme", VLMEVAL, own) == pytest.approx(expected, rel=1e-12)


@RUNS
@given(drawn=draws(LETTER, st.integers(2, 4)))
def test_mmbench(drawn: Any):
    choice, mmbench_ = vlmeval("dataset.utils.multiple_choice"), lmms("tasks.mmbench.mmbench_evals").MMBench_Evaluator()
    for text, right, count in drawn:
        right = right if right in "ABCD"[:count] else "A"
        shown = tuple(zip("ABCD", OPTIONS[:count], strict=False))
        own = labelled([mmbench.Label("1", shown, right, "")], [text])
        row = dict(shown) | {"index": 1, "question": "?", "answer": right, "prediction": text, "GT": right}
        assert value("mmbench", VLMEVAL, own) == 100 * choice.eval_vanilla(None, pd.Series(row))["hit"]
        row = pd.DataFrame([dict.fromkeys("ABCD", "nan") | row])
        hit = bool(mmbench_.prefetch_answer(row.iloc[0]) == right)
        assert value("mmbench", LMMS, own) == 100 * hit


@RUNS
@given(text=ANSWERS, people=st.lists(ANSWERS | st.sampled_from(["12", "one", "cat"]), min_size=10, max_size=10))
def test_textvqa_and_gqa(text: str, people: list[str]):
    own = labelled([vqa.Label(tuple(people))], [text])
    doc = {"answers": list(people), "question_id": 1}
    expected = 100 * lmms("tasks.textvqa.utils").textvqa_process_results(doc, [text])["exact_match"]
    assert value("textvqa", LMMS, own) == pytest.approx(expected, rel=1e-12)
    module = vlmeval("dataset.utils.vqa_eval")
    line = {"answer": str(list(people)), "prediction": text}
    (expected,) = module.hit_calculate([module.process_line(line, "vqa_score")], "TextVQA_VAL")
    assert value("textvqa", VLMEVAL, own) == pytest.approx(100 * expected, rel=1e-12)
    own = labelled([vqa.Label((people[0],))], [text])
    exact = lmms("api.metrics").exact_match_hf_evaluate
    expected = exact([text], [people[0]], ignore_case=True, ignore_punctuation=True)["exact_match"]
    assert value("gqa", LMMS, own) == 100 * expected
    (expected,) = module.process_line({"answer": str([people[0]]), "prediction": text}, "accuracy")["match"]
    assert value("gqa", VLMEVAL, own) == 100 * expected
