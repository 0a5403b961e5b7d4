"""Tests which outputs of a program depend on which of its inputs, on every release of JAX."""

import jax
import jax.numpy as jnp
from jax import lax

from microadam_jax.layers.dependence import dependences


def test_scans_keep_constants_carries_and_stacks_apart() -> None:
    def program(
        constant: jax.Array, carry: jax.Array, untouched: jax.Array, rows: jax.Array
    ) -> tuple[jax.Array, ...]:
        def body(
            carries: tuple[jax.Array, jax.Array], row: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
            moved, kept = carries
            return (moved + row.sum(), kept), (row * constant, kept)

        (moved, kept), (stacked, same) = lax.scan(body, (carry, untouched), rows)
        return moved, kept, stacked, same

    inputs = jnp.ones(()), jnp.ones(()), jnp.ones(3), jnp.ones((4, 3))
    found = dependences(jax.make_jaxpr(program)(*inputs))

    assert found == [0b1010, 0b0100, 0b1001, 0b0100]


def test_a_value_that_reaches_a_carry_rounds_later_counts() -> None:
    def program(first: jax.Array, second: jax.Array, third: jax.Array) -> jax.Array:
        def body(carries: tuple[jax.Array, ...], _: None) -> tuple[tuple[jax.Array, ...], None]:
            _, b, c = carries
            return (b, c, c), None

        return lax.scan(body, (first, second, third), length=5)[0][0]

    assert dependences(jax.make_jaxpr(program)(*[jnp.ones(())] * 3)) == [0b111]


def test_a_loops_end_reaches_what_it_carries() -> None:
    def program(limit: jax.Array, x: jax.Array) -> jax.Array:
        return lax.while_loop(lambda value: value < limit, lambda value: value + 1, x)

    assert dependences(jax.make_jaxpr(program)(jnp.ones(()), jnp.ones(()))) == [0b11]


def test_a_branch_chosen_by_the_platform_is_no_input() -> None:
    def program(x: jax.Array, y: jax.Array) -> jax.Array:
        return lax.platform_dependent(x, y, cpu=lambda x, y: x, default=lambda x, y: x * 2)

    assert dependences(jax.make_jaxpr(program)(jnp.ones(()), jnp.ones(()))) == [0b01]
