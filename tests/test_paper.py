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
