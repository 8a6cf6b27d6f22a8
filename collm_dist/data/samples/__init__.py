"""From interactions to samples: splits, histories, as-of counts, negatives."""
