import kvgen as kvgen  # before torch: it says how torch's threads wait
