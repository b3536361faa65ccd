"""The operator: public function, registry of backends, sharding, and the depth cache."""
