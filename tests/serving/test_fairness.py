from arriero.serving.fairness import FairQueue


def test_a_user_s_tenth_waits_behind_another_s_first() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(10):
        queue.push("a", f"a{number}")
    queue.push("b", "b0")
    order = [queue.pop() for _ in range(3)]
    queue.push("c", "c0")
    order += [queue.pop() for _ in range(len(queue))]
    assert order[:2] == ["a0", "b0"]
    assert order.index("c0") <= 4
    assert [each for each in order if each.startswith("a")] == [f"a{number}" for number in range(10)]


def test_nobody_waits_forever_behind_users_that_come() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(3):
        queue.push("a", f"a{number}")
    taken = []
    for number in range(30):
        queue.push(f"new{number}", f"new{number}")
        taken.append(queue.pop())
    assert "a2" in taken
    assert len(queue.last) < 200


def test_what_is_removed_does_not_come() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(6):
        queue.push("a", number)
    assert queue.remove(lambda each: each % 2 == 0) == [0, 2, 4]
    assert [queue.pop() for _ in range(len(queue))] == [1, 3, 5]
