from degrade import paper


def test_the_papers_test_errors():
    """Table 6 of arXiv:1512.03385, in percent. 110: the mean of five runs, not the best of them (6.43)."""
    table_6 = {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.61}
    residual = {p.depth: p.test_error for p in paper.CIFAR10 if p.block == "residual"}
    assert {depth: round(100 * error, 2) for depth, error in residual.items()} == table_6


def test_the_papers_plain_nets_degrade_and_its_residual_nets_do_not():
    plain = [p.train_error for p in paper.CIFAR10 if p.block == "plain"]
    residual = [p.train_error for p in paper.CIFAR10 if p.block == "residual"]
    assert plain == sorted(plain)
    assert residual == sorted(residual, reverse=True)
    assert 110 not in [p.depth for p in paper.CIFAR10 if p.block == "plain"]  # not drawn in Fig. 6


def test_every_number_has_its_source():
    there = {"plain": "arXiv:1512.03385", "residual": "arXiv:1512.03385", "preact": "arXiv:1603.05027"}
    assert all(there[p.block] in p.source for p in paper.CIFAR10)
    assert paper.STEPS == 64_000


def test_the_public_reproductions():
    """Their own logs' numbers, in percent: training / test. Every repository with each of its nets once."""
    by = {}
    for p in paper.REPRODUCTIONS:
        own = by.setdefault(p.source.split("/")[1], {})
        assert (p.block, p.depth) not in own
        own[p.block, p.depth] = tuple(e if e is None else round(100 * e, 2) for e in (p.train_error, p.test_error))
    assert {source: len(own) for source, own in by.items()} == {
        "a-martyn": 8,
        "wooyeolBaek": 9,
        "nabla0001": 5,
        "akamaster": 5,
    }
    assert by["a-martyn"]["plain", 56] == (3.33, 13.07)
    assert by["wooyeolBaek"]["residual", 110] == (0.05, 6.95)
    assert by["nabla0001"]["plain", 56] == (None, 12.95)
    assert by["akamaster"]["residual", 56] == (None, 6.61)
    assert all("best on test, 200 epochs" in p.source for p in paper.REPRODUCTIONS if "akamaster" in p.source)


def test_the_reproductions_are_fractions():
    for p in paper.REPRODUCTIONS:
        assert 0 <= (p.train_error or 0) < p.test_error < 0.15


def test_the_spread_of_what_was_published():
    """By hand from the table of reproductions; akamaster's best on test, the lowest of ResNet-20, is left out."""
    assert paper.spread("residual", 20) == ((0.0040, 0.0113), (0.0804, 0.0918))
    assert paper.spread("plain", 56) == ((0.0333, 0.0584), (0.1186, 0.1326))
    assert paper.spread("preact", 110) == (None, (0.0637, 0.0637))
    assert paper.spread("plain", 110) == (None, None)
