"""Image-text contrast (ITC): InfoNCE both ways, with ALBEF's momentum queue and soft targets where asked for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ae_fast import _checks
from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.models.peers import Peers

LOWEST, HIGHEST = 0.001, 0.5  # temperature


class ContrastiveLoss(nn.Module):
    """Cross-entropy of each image against all texts and of each text against all images, halved.

        loss = (CE(image text^T / temperature, same) + CE(text image^T / temperature, same^T)) / 2

    A row of `same` is spread evenly over the entries that are the same pair: one, where nothing is there twice.

    Args:
        width: of the embeddings.
        temperature: at the start; it is learned, and kept within [0.001, 0.5].
        queue_size: past embeddings of the momentum network to compare with besides the batch's; 0: none.
        queue_start: "empty", or "random": full of random embeddings of unit length, as ALBEF's code has it.

    Source: InfoNCE as in CLIP (arXiv:2103.00020); queue and soft targets: ALBEF (arXiv:2107.07651), section 3.2.
    """

    def __init__(self, width: int, *, temperature: float = 0.07, queue_size: int = 0, queue_start: str = "empty"):
        super().__init__()
        self.temperature = nn.Parameter(torch.empty(1))  # [1]: FSDP2 takes no scalars
        self.first_temperature, self.queue_size, self.queue_start = temperature, queue_size, queue_start
        if queue_size:
            self.register_buffer("image_queue", torch.empty(queue_size, width))
            self.register_buffer("text_queue", torch.empty(queue_size, width))
            self.register_buffer("queued", torch.empty((), dtype=torch.int64))  # pairs ever put there
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The temperature and the queue of the start."""
        nn.init.constant_(self.temperature, self.first_temperature)
        for buffer in self.buffers():
            buffer.zero_()
        if self.queue_size and self.queue_start == "random":
            for queue in (self.image_queue, self.text_queue):
                queue.copy_(F.normalize(torch.randn_like(queue), dim=1))
            self.queued.fill_(self.queue_size)

    def bound_temperature(self) -> None:
        """Bring it back within its bounds. `forward` does so, but a sharded model has only a copy of it there."""
        self.temperature.data.clamp_(LOWEST, HIGHEST)  # .data: the backward pass of another forward may be to come

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        same: Tensor | None = None,
        same_text: Tensor | None = None,
        *,
        answers: tuple[Tensor, Tensor] | None = None,
        momentum: tuple[Tensor, Tensor] | None = None,
        soft: float = 0.0,
    ) -> Tensor:
        """The loss, an fp32 scalar.

        Args:
            image, text: [B, E] embeddings of unit length.
            same: [B, N] bool, image i and the text of answer j belong together; None: the diagonal (N is B then).
            same_text: [N, B] bool, the image of answer i and text j do; None: `same`.
            answers: [N, E] image and text embeddings to compare with, those of all processes, together with the
                queue's. They are put into the queue in training. None: `momentum`, or else `image` and `text`.
            momentum: image and text embeddings of the momentum network, [B, E], for soft targets.
            soft: share of the momentum network's own similarities in the targets.
        """
        self.bound_temperature()
        with torch.autocast(image.device.type, enabled=False):
            image, text = image.float(), text.float()
            if same is None:
                same = torch.eye(len(image), dtype=torch.bool, device=image.device)
            same_text = same if same_text is None else same_text
            image_teacher, text_teacher = (None, None) if momentum is None else map(Tensor.float, momentum)
            of_images, of_texts = map(Tensor.float, answers or momentum or (image, text))
            images, texts, real = of_images, of_texts, None
            if self.queue_size:
                images = torch.cat([of_images, self.image_queue])
                texts = torch.cat([of_texts, self.text_queue])
                waiting = torch.arange(self.queue_size, device=image.device) < self.queued
                real = torch.cat([torch.ones_like(same[0]), waiting])
            loss = (
                self._one_way(image, texts, same, real, image_teacher, soft)
                + self._one_way(text, images, same_text.T, real, text_teacher, soft)
            ) / 2
            if self.queue_size and self.training:
                self._enqueue(of_images, of_texts)
        return loss

    def _one_way(
        self, asking: Tensor, answers: Tensor, same: Tensor, real: Tensor | None, teacher: Tensor | None, soft: float
    ) -> Tensor:
        def logits(x: Tensor) -> Tensor:
            scores = x @ answers.T / self.temperature
            return scores if real is None else scores.masked_fill(~real, -torch.inf)

        target = F.pad(same.float(), (0, len(answers) - same.shape[1]))
        target = target / target.sum(1, keepdim=True)
        if soft:
            with torch.no_grad():
                target = soft * logits(teacher).softmax(1) + (1 - soft) * target
        log_p = logits(asking).log_softmax(1)
        return -(target * log_p.masked_fill(target == 0, 0)).sum(1).mean()  # 0 * -inf is not 0

    @torch.no_grad()
    def _enqueue(self, image: Tensor, text: Tensor) -> None:
        count = min(len(image), self.queue_size)
        place = (self.queued + torch.arange(count, device=image.device)) % self.queue_size
        self.image_queue.index_copy_(0, place, image[:count].to(self.image_queue.dtype))
        self.text_queue.index_copy_(0, place, text[:count].to(self.text_queue.dtype))
        self.queued.add_(count)  # after .data.clamp_, a compiled += would be returned as the loss


def meet(joined: bool, batch: ImageTextBatch, **counts: int) -> Peers:
    """The processes that compare their pairs, which are counted, and whatever else they count; arguments as Peers'."""
    facts, says = (0 if x is None else x.shape[1] for x in (batch.facts, batch.says))
    return Peers(joined, pairs=len(batch), facts=facts, says=says, **counts)


def same_pairs(
    batch: ImageTextBatch, image_ids: Tensor | None = None, peers: Peers | None = None
) -> tuple[Tensor, Tensor]:
    """Image i belongs to text j: their own pair, or one whose image or text is the very same, or one that the data
    knows to be right: the image has all facts that the text says.

    Images are compared by a 64-bit fingerprint of their bytes, or by `image_ids` [B]; texts by one of their words.

    Args:
        peers: the processes that have B of all N pairs each, as `meet` has them; None: this one, which has all.

    Returns:
        ([B, N] bool of this process's images and all texts, [N, B] of all images and this process's texts).

    Raises:
        ValueError, TypeError: image_ids are not B integers.
    """
    B = len(batch)
    if image_ids is None:
        image_ids = _fingerprints(batch.images.permute(0, 2, 3, 1).reshape(B, -1))
    else:
        _checks.shape("image_ids", image_ids, (B,))
        _checks.dtype("image_ids", image_ids, _checks.INTEGERS)
        image_ids = image_ids.to(batch.device)
    lengths = batch.text_lengths
    numbers = torch.arange(B, device=batch.device)
    sample = numbers.repeat_interleave(lengths.cu.diff(), output_size=lengths.total)
    place = torch.arange(lengths.total, device=batch.device) - lengths.cu[:-1][sample]
    words = torch.zeros(B, dtype=torch.int64, device=batch.device)
    words.index_add_(0, sample, (batch.text.long() + 1) * _weights(lengths.max, batch.device)[place])
    peers = meet(False, batch) if peers is None else peers
    all_images, all_words = peers.gather("pairs", image_ids.long(), words)
    same = (image_ids[:, None] == all_images) | (words[:, None] == all_words)
    if not any(peers.counts["says"]):
        return same, same.T
    facts, says = (_widened(getattr(batch, name), words, max(1, *peers.counts[name])) for name in ("facts", "says"))
    (all_facts,), (all_says,) = peers.gather("pairs", facts), peers.gather("pairs", says)
    of_images = same | _says_true(facts, all_says)
    return of_images, of_images if peers.alone else same.T | _says_true(all_facts, says)


def _widened(numbers: Tensor | None, like: Tensor, width: int) -> Tensor:
    """[B, width], as other processes have them: `numbers` [B, F], or those of nothing, as many rows as `like` has."""
    numbers = like[:, None][:, :0] if numbers is None else numbers
    return F.pad(numbers, (0, width - numbers.shape[1]))


def _says_true(facts: Tensor, says: Tensor) -> Tensor:
    """[N, n] bool: image i [N, F] has all facts that text j [n, S] says, and that says some."""
    true = (says != 0).any(1).expand(len(facts), -1)
    for fact in says.unbind(1):
        true = true & ((facts[:, :, None] == fact).any(1) | (fact == 0))
    return true


def _fingerprints(rows: Tensor) -> Tensor:
    """[N] int64, of the bytes of each row."""
    data = rows.contiguous().view(torch.uint8)
    data = F.pad(data, (0, -data.shape[1] % 8)).view(torch.int64)
    return (data * _weights(data.shape[1], rows.device)).sum(1)


def _weights(count: int, device: torch.device) -> Tensor:
    """[count] odd numbers that look random: every bit of place k counts, and no two places count alike."""
    k = torch.arange(1, count + 1, device=device) * -7046029254386353131
    k = (k ^ (k >> 29)) * -4658895280553007687
    return (k ^ (k >> 32)) | 1
