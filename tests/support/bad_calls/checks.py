"""Wrong calls of `check_batch_norm`."""

from __future__ import annotations

from .texts import Bad

FORWARD = "forward: expected a function of (x, weight, bias, eps) that returns y; got "
WRAP = "Write a function that makes the layer, sets its weight and bias, and calls it"
CALL, MADE = "check({})", "check = arraybn.testing.check_batch_norm\ndef forward(x, weight, bias, eps): return x\n"
CLASS = "class Norm:\n    def __call__(self, *x): return self.forward(*x)\n    def forward(self, x): return x\n"

CHECKS = [
    *[
        Bad(CALL.format(given), TypeError, FORWARD + got, "forward", remedy, MADE + more)
        for given, got, remedy, more in (
            ("mine", "mine(x, weight, bias)", "", "def mine(x, weight, bias): return x"),
            ("mine", "mine(x, weight, bias, eps, momentum)", "", "def mine(x, weight, bias, eps, momentum): return x"),
            ("mine", "mine(x, *, weight, bias, eps)", "", "def mine(x, *, weight, bias, eps): return x"),
            ("lambda x: x", "lambda(x)", "", ""),
            ("Norm", f"the class Norm. {WRAP}", WRAP, CLASS),
            ("Norm()", f"a layer of type Norm. {WRAP}", WRAP, CLASS),
            ("BatchNorm1d", f"the class BatchNorm1d. {WRAP}", WRAP, ""),
            ("BatchNorm1d(3)", f"a layer of type BatchNorm1d. {WRAP}", WRAP, ""),
            ("X", "an object of type ndarray", "", ""),
            ("None", "an object of type NoneType", "", ""),
        )
    ],
    Bad(
        CALL.format("torch.nn.BatchNorm1d(3), xp=torch"),
        TypeError,
        FORWARD + f"a layer of type BatchNorm1d. {WRAP}",
        "forward",
        WRAP,
        MADE,
        needs="torch",
    ),
    Bad(
        CALL.format("forward, forward"),
        TypeError,
        "backward: expected a function of (dy, x, weight, bias, eps) that returns dx, dweight, dbias;"
        " got forward(x, weight, bias, eps)",
        "backward",
        setup=MADE,
    ),
    Bad(
        CALL.format("forward, jvp=forward"),
        TypeError,
        "jvp: expected a function of (x_dot, x, weight, weight_dot, bias_dot, eps) that returns y_dot;"
        " got forward(x, weight, bias, eps)",
        "jvp",
        setup=MADE,
    ),
    Bad(
        CALL.format("forward, double_backward=3"),
        TypeError,
        "double_backward: expected a function of (v, dy, x, weight, v_weight, v_bias, eps) that returns ddy, ddx,"
        " ddweight; got an object of type int",
        "double_backward",
        setup=MADE,
    ),
    Bad(
        CALL.format("forward, update=lambda m, v, x: (m, v)"),
        TypeError,
        "update: expected a function of (running_mean, running_var, x, momentum) that returns running_mean,"
        " running_var; got lambda(m, v, x)",
        "update",
        setup=MADE,
    ),
    *[
        Bad(
            CALL.format(f"forward, {name}={value}"),
            error,
            f"{name}: expected {expected}; got {value}",
            name,
            setup=MADE,
        )
        for name, value, error, expected in (
            ("accuracy", "'some'", ValueError, "'full' or 'sums'"),
            ("accuracy", "None", ValueError, "'full' or 'sums'"),
            ("dtype", "'int8'", ValueError, "'float16', 'bfloat16', 'float32' or 'float64'"),
            ("tolerance", "0", ValueError, "a number > 0"),
            ("max_ratio", "0.5", ValueError, "a number from 1 to 1e6"),
        )
    ],
]
