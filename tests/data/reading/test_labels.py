import csv
from collections import Counter

import pytest

from vab.data.reading.labels import read_keys, read_vocabulary
from vab.spec import UserError


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_is_read_in_the_order_of_its_index_with_commas_in_names(tmp_path):
    text = 'index,mid,display_name\n1,/m/b,"Narration, monologue"\n0,/m/a,Speech\n'
    vocabulary = read_vocabulary(written(tmp_path / "c.csv", text))
    assert vocabulary.names == ("Speech", "Narration, monologue")
    assert vocabulary.number("Narration, monologue") == vocabulary.number("/m/b") == 1
    with pytest.raises(
        UserError, match=r"no class 'Narration monologue' among the 2 of .*c\.csv; the nearest is 'Narr"
    ):
        vocabulary.number("Narration monologue")


def test_a_name_that_is_also_another_classs_id_is_the_name(tmp_path):
    (tmp_path / "classes.csv").write_text("index,mid,display_name\n0,bell,dog\n1,x,bell\n")
    found = read_vocabulary(tmp_path / "classes.csv")
    assert (found.number("bell"), found.number("dog"), found.number("x")) == (1, 0, 1)


@pytest.mark.parametrize("name", ["names.txt", "names.csv"])
def test_names_may_stand_one_a_line(tmp_path, name):
    assert read_vocabulary(written(tmp_path / name, "yes\nno\nsilence\n")).names == ("yes", "no", "silence")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("index,mid,display_name\n0,/m/a,Narration, monologue\n", r"line 2: 4 columns instead of 3: .*double quotes"),
        ("index,mid,display_name\n0,/m/a,a\n2,/m/b,b\n", r"must count 0 to 1, each once: 1 is not there"),
        ("index,mid,display_name\n0,/m/a,a\n1,/m/b,a\n", r"the class 'a' is there more than once"),
        ("index,mid,display_name\n0,/m/a,a\n1,/m/a,b\n", r"the id '/m/a' is there more than once"),
        ("index,mid,display_name\nx,/m/a,a\n", r"whole numbers"),
        ("", r"names no class"),
    ],
)
def test_a_broken_list_is_refused(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        read_vocabulary(written(tmp_path / "c.csv", text))


def test_no_list_at_all_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv: there is no such file$"):
        read_vocabulary(tmp_path / "none.csv")


def test_official_lists_are_read_as_they_are(shared_data):
    lists = shared_data / "lists"
    audioset = read_vocabulary(lists / "audioset_class_labels_indices.csv")
    assert len(audioset.names) == 527
    assert audioset.names[:2] == ("Speech", "Male speech, man speaking")
    assert audioset.names[526] == "Field recording"
    assert audioset.number("/m/09x0r") == 0
    assert len(read_vocabulary(lists / "esc50_class_labels_indices.csv").names) == 50
    vggsound = read_vocabulary(lists / "vggsound_class_labels_indices.csv")
    assert len(vggsound.names) == 309
    with (lists / "vggsound_test.csv").open(newline="") as file:
        labels = [row[1] for row in csv.reader(file)]
    assert len(labels) == 15446
    assert {vggsound.number(label) for label in labels} == set(range(309))


def test_the_retrieval_list_has_five_of_each_of_309_classes(shared_data):
    path = str(shared_data / "lists" / "vggsound_retrieval_5_per_class.json")
    keys = read_keys(path, "video_id", "labels", 5)
    assert len(keys) == len(set(keys)) == 1545 == 309 * 5
    with pytest.raises(UserError, match="must have 4 keys of each class; 309 differ"):
        read_keys(path, "video_id", "labels", 4)
    assert Counter(len(key.rsplit("_", 1)[1]) for key in keys) == {6: 1545}  # YouTube id and start second


def test_a_list_without_a_first_line_loses_no_key(tmp_path):
    path = written(tmp_path / "keys.csv", "a1\nb2\nc3\n")
    with pytest.raises(UserError, match="'a1', a name or a key"):
        read_keys(path, None, None, None)
    assert read_keys(path, "0", None, None) == ("a1", "b2", "c3")
    assert read_keys(path, "a1", None, None) == ("b2", "c3")
    assert read_keys(written(tmp_path / "named.csv", "id\nb2\n"), None, None, None) == ("b2",)
