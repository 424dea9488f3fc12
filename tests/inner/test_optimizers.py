import pytest

from fomal.inner import SGD, Adam


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(lr=-1), "lr=-1 must not be negative"),
        (lambda: SGD(momentum=float("nan")), "momentum=nan must not be negative"),
        (lambda: Adam(beta1=1.0), "beta1=1.0 must be below 1"),
        (lambda: Adam(eps=-1e-8), "eps=-1e-08 must not be negative"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_released_adam_keeps_no_first_moment(network):
    params = dict(network.named_parameters())
    assert set(Adam().init(params)) == {"shared", "second_moment"}
    assert set(Adam(beta1=0.9).init(params)) == {"shared", "second_moment", "first_moment"}
    assert SGD().init(params) == {}
