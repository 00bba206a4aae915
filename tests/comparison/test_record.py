from comparison.record import Training


def test_a_loss_after_a_share_of_the_steps_is_the_nearest_evaluation() -> None:
    training = Training(4, 0.9, ((0, 2.0), (2, 1.5), (4, 1.2), (6, 1.0), (8, 0.9), (10, 0.8)), {})
    assert [training.after(share) for share in (0.25, 0.5, 1.0)] == [1.5, 1.2, 0.8]
    assert Training(4, 0.9, ((0, 2.0), (1, 0.9)), {}).after(0.25) == 0.9  # never the base model's
