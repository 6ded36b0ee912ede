"""Arrow files read from where they lie: what pyarrow reads, whatever other columns stand beside."""

import datetime
import decimal

import pytest

from m3ae_fast.data.arrow import ArrowRows

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
ipc = pytest.importorskip("pyarrow.ipc")

MOST = 1 << 20
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
READ = {  # types with values of five rows
    "text": (pa.string(), ["one", None, "", "zwölf", "five"]),
    "large text": (pa.large_string(), ["one", None, "", "zwölf", "five"]),
    "bytes": (pa.binary(), [b"\0\xff", b"", None, b"abc", b"d"]),
    "large bytes": (pa.large_binary(), [b"\0\xff", b"", None, b"abc", b"d"]),
    "number": (pa.int64(), [1, -(2**63), None, 2**63 - 1, 0]),
    "texts": (pa.list_(pa.string()), [["a", None], [], None, ["b", "", "c"], ["d"]]),
    "large texts": (pa.large_list(pa.large_string()), [["a", None], [], None, ["b", "", "c"], ["d"]]),
    "numbers": (pa.list_(pa.int64()), [[1, 2], [], None, [-3], [4]]),
    "image": (
        IMAGE,
        [{"bytes": b"x", "path": None}, None, {"bytes": None, "path": "p"}, {"bytes": b"", "path": ""}, None],
    ),
}
DAY = datetime.date(2026, 1, 2)
PASSED_OVER = {
    "null": (pa.null(), [None] * 5),
    "small": (pa.int8(), [1, None, 3, 4, 5]),
    "half": (pa.float16(), [1.0] * 5),
    "bool": (pa.bool_(), [True, None, False, True, True]),
    "decimal": (pa.decimal128(5, 2), [decimal.Decimal("1.25"), None] + [decimal.Decimal(2)] * 3),
    "date": (pa.date32(), [DAY, None, DAY, DAY, DAY]),
    "time": (pa.time64("us"), [datetime.time(1), None] + [datetime.time(2)] * 3),
    "stamp": (pa.timestamp("s"), [datetime.datetime(2026, 1, 2)] * 5),
    "duration": (pa.duration("s"), [datetime.timedelta(1)] * 5),
    "interval": (pa.month_day_nano_interval(), [pa.MonthDayNano([1, 2, 3])] * 5),
    "fixed": (pa.binary(3), [b"abc", None] + [b"def"] * 3),
    "pair": (pa.list_(pa.int32(), 2), [[1, 2], None, [3, 4], [5, 6], [7, 8]]),
    "map": (pa.map_(pa.string(), pa.list_(pa.bool_())), [[("k", [True])], None, [], [("l", [])], []]),
    "nested": (
        pa.struct({"a": pa.list_(pa.struct({"b": pa.null(), "c": pa.large_list(pa.date64())})), "d": pa.bool_()}),
        [{"a": [{"b": None, "c": [DAY]}], "d": True}, None, {"a": None, "d": None}, {"a": [], "d": False}, None],
    ),
}


def write(path, columns, rows_each=2):
    table = pa.table(
        {n: values for n, (_, values) in columns.items()}, pa.schema({n: t for n, (t, _) in columns.items()})
    )
    with ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table, max_chunksize=rows_each)
    return path


def assert_read(path, columns):
    rows = ArrowRows([path])
    assert len(rows) == 5 and list(rows.columns) == list(columns)
    for name in READ.keys() & columns.keys():
        assert [rows.cell(name, row, MOST) for row in range(5)] == columns[name][1], name


@pytest.mark.parametrize("beside", [*PASSED_OVER, *READ])
def test_a_column_behind_any_other(tmp_path, beside):
    columns = {beside: (PASSED_OVER | READ)[beside], **READ}
    assert_read(write(tmp_path / "a.arrow", columns), columns)


@pytest.mark.parametrize("rows_each", [1, 5])
def test_all_at_once(tmp_path, rows_each):
    columns = PASSED_OVER | READ
    assert_read(write(tmp_path / "a.arrow", columns, rows_each), columns)


def test_types_in_words(tmp_path):
    columns = ArrowRows([write(tmp_path / "a.arrow", PASSED_OVER | READ)]).columns
    assert {str(columns[name]) for name in ("text", "large text")} == {"text"}
    assert str(columns["large texts"]) == "list of text" and str(columns["numbers"]) == "list of int64"
    assert str(columns["image"]) == "struct of bytes: bytes, path: text" and str(columns["small"]) == "other"


@pytest.mark.parametrize(
    "kind, values, message",
    [
        (pa.string_view(), ["a"], "a type that is not known, or too many: type 24, column 0"),
        (pa.run_end_encoded(pa.int32(), pa.string()), None, "a type that is not known, or too many: type 22"),
        (pa.dense_union([pa.field("a", pa.int64())]), None, "a type that is not known, or too many: type 14"),
        (pa.dictionary(pa.int8(), pa.string()), ["a"], "it must not have columns of dictionaries"),
    ],
)  # fmt: skip
def test_types_that_are_refused(tmp_path, kind, values, message):
    schema = pa.schema({"a": kind})
    with ipc.new_stream(tmp_path / "a.arrow", schema) as stream:
        if isinstance(values, list):
            stream.write_batch(pa.record_batch({"a": pa.array(values).cast(kind)}, schema))
    with pytest.raises(ValueError, match=rf"a\.arrow cannot be read as an Arrow stream: .*{message}"):
        ArrowRows([tmp_path / "a.arrow"])


def test_too_deep_or_twice_the_same(tmp_path):
    kind = pa.string()
    for _ in range(9):
        kind = pa.list_(kind)
    with pytest.raises(ValueError, match="a type that is not known, or too many: type 12, column 8"):
        ArrowRows([write(tmp_path / "a.arrow", {"a": (kind, [None] * 5)})])
    table = pa.Table.from_arrays([pa.array(["x"])] * 2, ["a", "a"])
    with ipc.new_stream(tmp_path / "b.arrow", table.schema) as stream:
        stream.write_table(table)
    with pytest.raises(ValueError, match="its columns must have different names"):
        ArrowRows([tmp_path / "b.arrow"])


def test_values_are_measured(tmp_path):
    """Of a list, its values together."""
    texts = pa.list_(pa.string())
    columns = {
        "text": (pa.string(), ["a" * 30] * 5),
        "texts": (texts, [["a" * 10] * 3] * 5),
        "many": (texts, [[None] * 9] * 5),
    }
    rows = ArrowRows([write(tmp_path / "a.arrow", columns)])
    for name, size in (("text", 30), ("texts", 30), ("many", 72)):
        assert rows.cell(name, 4, size) == columns[name][1][4]
        with pytest.raises(ValueError, match=f"it has more than {size - 1} bytes"):
            rows.cell(name, 4, size - 1)
