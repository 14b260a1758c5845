"""The public trace formats; the project's own and the plain one are in test_arrivals."""

import pytest

from flexjax.workload import Arrival, load_trace, read_trace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
ROWS = (
    "5,ChatGPT,472,18,490,Conversation log\n"
    "45,ChatGPT,0,0,0,Conversation log\n"
    "118,GPT-4,417,276,693,API log\n"
    "118,ChatGPT,20,30,50,API log\n"
)


def written(tmp_path, content):
    file = tmp_path / "t.csv"
    file.write_text(content, "utf-8")
    return file


def test_azure_2023(tmp_path):
    """Seven digits, no offset, and a day that ends on the way."""
    content = (
        AZURE + "2023-11-16 23:59:59.6805900,374,44\r\n"
        "2023-11-17 00:00:00.0000001,396,109\r\n2023-11-17 01:00:00.6805900,879,55"
    )
    trace = read_trace(written(tmp_path, content))
    assert trace.format == "azure"
    assert trace.arrivals == (
        Arrival(0.0, 374, 44),
        Arrival(0.3194101, 396, 109),
        Arrival(3601.0, 879, 55),
    )


def test_azure_2024(tmp_path):
    """Offsets, and a fraction that is left out where it is 0."""
    content = (
        AZURE + "2024-05-10 00:00:00.009930+00:00,2162,5\n"
        "2024-05-10 00:00:01+00:00,2399,6\n2024-05-10 02:00:02.009930+02:00,76,15\n"
    )
    arrivals = load_trace(written(tmp_path, content))
    assert arrivals == [Arrival(0.0, 2162, 5), Arrival(0.99007, 2399, 6), Arrival(2.0, 76, 15)]
    assert load_trace(written(tmp_path, content), 1) == arrivals[:1]


def test_burstgpt(tmp_path):
    content = BURST + ROWS.replace("45,ChatGPT,0,0,0,Conversation log\n", "")
    trace = read_trace(written(tmp_path, content))
    assert trace.format == "burstgpt"
    assert trace.arrivals == (Arrival(5, 472, 18), Arrival(118, 417, 276), Arrival(118, 20, 30))
    assert (trace.num_failures, trace.num_filtered) == (0, 0)


def test_burstgpt_failures_are_an_error_unless_left_out(tmp_path):
    file = written(tmp_path, BURST + ROWS)
    with pytest.raises(ValueError, match=r"t\.csv:3: `Response tokens` .*; got '0', a failed req"):
        load_trace(file)
    trace = read_trace(file, leave_out_failures=True)
    assert [a.arrival_s for a in trace.arrivals] == [5, 118, 118]
    assert trace.num_failures == 1
    assert len(read_trace(file, 2, leave_out_failures=True).arrivals) == 2


def test_burstgpt_filters(tmp_path):
    file = written(tmp_path, BURST + ROWS)
    trace = read_trace(file, models=["GPT-4"])
    assert trace.arrivals == (Arrival(118, 417, 276),)
    assert (trace.num_failures, trace.num_filtered) == (0, 3)
    trace = read_trace(file, models=["ChatGPT"], log_types={"API log"})
    assert trace.arrivals == (Arrival(118, 20, 30),)
    with pytest.raises(ValueError, match="holds no request; 0 failures and 4 rows of other models"):
        read_trace(file, models=["gpt-4"])


def test_burstgpt_with_sessions_and_another_order(tmp_path):
    content = (
        "Timestamp,Session ID,Elapsed time,Model,Log Type,Request tokens,Response tokens,"
        "Total tokens\n7.5,s1,2.25,GPT-4,API log,10,20,30\n"
    )
    assert load_trace(written(tmp_path, content)) == [Arrival(7.5, 10, 20)]


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path):
    content = "\ufeff" + AZURE + "2023-11-16 18:15:46,1,2\n"
    assert load_trace(written(tmp_path, content)) == [Arrival(0.0, 1, 2)]


def test_what_follows_the_last_request_is_not_read(tmp_path):
    file = tmp_path / "t.csv"
    file.write_bytes((BURST + "5,m,1,2,3,x\n" + "6,m,1,2,3,x\n" * 3000).encode() + b"\xff")
    assert load_trace(file, 1) == [Arrival(5, 1, 2)]
    with pytest.raises(ValueError, match="is not UTF-8"):
        load_trace(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (AZURE + "2023-13-16 18:15:46,1,2\n", r"t\.csv:2: `TIMESTAMP` must be a date and time"),
        (AZURE + "5,1,2\n", r"t\.csv:2: `TIMESTAMP` must be .*; got '5'"),
        (AZURE + "2023-11-16 18:15:46.,1,2\n", "`TIMESTAMP` must be a date and time"),
        (AZURE + "2023-11-16 18:15:46,1,0\n", "`GeneratedTokens` must be an integer >= 1; got '0'"),
        (AZURE + "2023-11-16 18:15:46,0,1\n", "`ContextTokens` must be an integer >= 1; got '0'"),
        (
            AZURE + "2023-11-16 18:15:46,1,2\n2023-11-16 18:15:45.9999999,1,2\n",
            r"t\.csv:3: arrival times must not decrease; got 2023-11-16 18:15:45.9999999 after",
        ),
        (BURST + "x,m,1,2,3,l\n", r"t\.csv:2: `Timestamp` must be a number >= 0; got 'x'"),
        (BURST + "1,m,1,2,3\n", r"t\.csv:2: expected 6 fields .*; got 5"),
        (BURST + "9,m,1,2,3,l\n1,m,1,2,3,l\n", r"t\.csv:3: arrival times must not decrease"),
        (BURST + "1,m,0,2,2,l\n", "`Request tokens` must be an integer >= 1; got '0'"),
        (BURST + "1,m,1,-2,2,l\n", "`Response tokens` must be an integer >= 1; got '-2'"),
        (BURST.replace("Log Type", "Type") + "1,m,1,2,3,l\n", r"t\.csv:1: a file of several col"),
        (BURST.replace("Log", "Model,Log") + "1,m,1,2,3,m,l\n", "header of a known format"),
    ],
)
def test_unusable_lines(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_trace(written(tmp_path, content))


def test_filters_need_their_column(tmp_path):
    file = written(tmp_path, AZURE + "2023-11-16 18:15:46,1,2\n")
    with pytest.raises(
        ValueError, match=r"t\.csv:1: .*got a filter for Model in a file of the azu"
    ):
        read_trace(file, models=["m"])
    with pytest.raises(ValueError, match=r"got a filter for Log Type in a file of the plain"):
        read_trace(written(tmp_path, "1\n2\n"), log_types=["m"])


def test_filters_are_collections(tmp_path):
    """One text would match every model that is a part of it."""
    file = written(tmp_path, BURST + "1,GPT,1,2,3,l\n")
    with pytest.raises(ValueError, match="`models` must be a collection of names, not one; got"):
        read_trace(file, models="GPT-4")
    assert len(read_trace(file, models=("GPT",)).arrivals) == 1


def test_bad_number_of_requests(tmp_path):
    with pytest.raises(ValueError, match="`max_requests` must be an integer >= 1; got 0"):
        load_trace(written(tmp_path, "1\n"), 0)
