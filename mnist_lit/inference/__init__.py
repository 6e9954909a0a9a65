"""A trained network ready to use, pictures brought to MNIST's form, and the page that serves it."""
