"""Using a trained model: loading it, bringing images into MNIST's form, and the web application."""
