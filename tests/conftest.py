"""Settings of every test: eight virtual devices, so that meshes can be tested anywhere."""

import hypothesis
import jax

# Each new shape compiles anew, which takes longer than any deadline and leaves time for few.
hypothesis.settings.register_profile("jax", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.load_profile("jax")

jax.config.update("jax_num_cpu_devices", 8)
