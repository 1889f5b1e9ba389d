"""The map of a store: keys, questions and regions in two dimensions, and the confusion matrix beside them."""
