"""The operators, `torch.ops.tsa.*`: one row each. docs/operators.md is the contract; registry.py says what a row becomes.

To add one: a reference and a host function in kernels/<operation>/, a check (checks.py), a fake (fakes.py), how its flat
arguments become the types that these take (arguments.py), and a row below.
Importing this file imports neither Triton nor any implementation.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from tsa_compile.kernels import (
    arguments,
    checks,
    decode_checks,
    fakes,
    kept,
    key_block_checks,
    page_basis_checks,
    page_checks,
    projected_checks,
    routed_checks,
    team_checks,
)
from tsa_compile.kernels.registry import LIBRARY, Operator, add, observing, register

_RULE = "float coverage, int window, int pool, int min_tokens"
_LISTS = "Tensor indices, Tensor counts"
_ORDER = "Tensor? order, Tensor? ranks"  # of tsa::key_view
_STRIP = "int strip_window, int strip_sinks"
_ATTENDED = "(Tensor out, Tensor lse)"
_CACHE = "Tensor? blocks, int block, Tensor? start, Tensor? lengths, Tensor? key_mask, float scale"  # KvView, then what is read
_BLOCK_RULE = "int pool, int window, int sinks, int last_dense"
_VIEW = "Tensor? blocks, int block, Tensor? start, Tensor? lengths"
_PADDING = "Tensor? start, Tensor? lengths, Tensor? key_mask"
_K_LEN = "int? k_len=None"  # positions of a row of the batch, where blocks have room for more
_MASKS = "Tensor? mask=None, Tensor? sinks=None, float softcap=0.0"

OPERATORS = (
    Operator(
        "materialize(Tensor x) -> Tensor",
        check=checks.materialize,
        fake=fakes.materialize,
        reference="materialize:copied",
        host="materialize:copied",
    ),
    Operator(
        "key_view(Tensor key_mask) -> (Tensor order, Tensor ranks)",
        check=checks.key_view,
        fake=fakes.key_view,
        reference="common.ranks:rank_order_reference",
        host="common.ranks:rank_order",
    ),
    Operator(
        f"select_tokens(Tensor q, Tensor k, {_ORDER}, float scale, {_RULE}, int heavy, *, str share='head',"
        " int min_queries=0) -> (Tensor indices, Tensor counts, Tensor heavy_indices)",
        check=checks.select_tokens,
        fake=fakes.select_tokens,
        reference="compose_reference:select_tokens_reference",
        host="compose:select_tokens",
        arguments=arguments.select_tokens,
        kept=kept.keys,
    ),
    Operator(
        f"sparse_attention(Tensor q, Tensor k, Tensor v, {_LISTS}, Tensor heavy_indices, {_ORDER}, float scale, {_STRIP},"
        f" int dense_below, str engine, bool need_lse=False) -> {_ATTENDED}",
        check=checks.sparse_attention,
        fake=fakes.attention,
        reference="attend.tokens.reference:sparse_attention_reference",
        host="attend.tokens.host:sparse_attention",
        arguments=arguments.sparse_attention,
    ),
    Operator(
        f"token_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, float scale, {_RULE}, {_STRIP}, int heavy,"
        " str engine) -> Tensor",
        check=checks.token_sparse_attention,
        fake=fakes.token_sparse_attention,
        reference="compose:token_sparse_attention",
        host="compose:token_sparse_attention",
        arguments=arguments.token_sparse_attention,
    ),
    Operator(
        f"select_keys(Tensor q, Tensor k, {_ORDER}, float scale, float coverage, int probes, int min_keys)"
        " -> (Tensor indices, Tensor counts)",
        check=checks.select_keys,
        fake=fakes.select_keys,
        reference="compose_reference:select_keys_reference",
        host="compose:select_keys",
        arguments=arguments.select_keys,
        kept=kept.keys,
    ),
    Operator(
        "remember_keys(Tensor q, Tensor k, float scale, int queries, int count) -> (Tensor indices, Tensor counts)",
        check=checks.remember_keys,
        fake=fakes.remember_keys,
        reference="compose_reference:remember_keys_reference",
        host="compose:remember_keys",
        arguments=arguments.remember_keys,
        kept=kept.keys,
    ),
    Operator(
        f"key_attention(Tensor q, Tensor k, Tensor v, {_LISTS}, float scale, bool need_lse=False) -> {_ATTENDED}",
        check=checks.key_attention,
        fake=fakes.attention,
        reference="attend.keys.reference:key_attention_reference",
        host="attend.keys.host:key_attention",
        arguments=arguments.key_attention,
    ),
    Operator(
        f"token_block_attention(Tensor q, Tensor k, Tensor v, {_LISTS}, Tensor heavy_indices, {_ORDER}, float scale, {_STRIP},"
        f" float alpha, {_BLOCK_RULE}, str share, str engine, bool need_lse=False) -> {_ATTENDED}",
        check=key_block_checks.token_block_attention,
        fake=fakes.attention,
        reference="compose_reference:token_block_attention_reference",
        host="compose:token_block_attention",
        arguments=arguments.token_block_attention,
    ),
    Operator(
        f"merge(Tensor out, Tensor lse, Tensor other, Tensor other_lse) -> {_ATTENDED}",
        check=checks.merge,
        fake=fakes.merge,
        reference="common.merge:merge_reference",
        host="common.merge:merge",
        arguments=arguments.merge,
    ),
    Operator(
        f"decode_attention(Tensor q, Tensor k, Tensor v, {_CACHE}, {_MASKS}, int window=0, bool causal=True,"
        " bool scores=False) -> (Tensor out, Tensor lse, Tensor scores)",
        check=decode_checks.decode_attention,
        fake=fakes.decode_attention,
        reference="attend.decode.reference:decode_attention_reference",
        host="attend.decode.host:decode_attention",
    ),
    Operator(
        f"page_attention(Tensor q, Tensor k, Tensor v, {_LISTS}, {_CACHE}, {_MASKS}, bool causal=True,"
        " int[]? windows=None, int first_keys=0) -> (Tensor out, Tensor lse)",
        check=decode_checks.page_attention,
        fake=fakes.page_attention,
        reference="attend.decode.reference:page_attention_reference",
        host="attend.decode.host:page_attention",
    ),
    Operator(
        f"sampled_value_attention(Tensor q, Tensor k, Tensor v, {_CACHE}, Tensor seed, int samples, str form, {_MASKS})"
        f" -> {_ATTENDED}",
        check=decode_checks.sampled_value_attention,
        fake=fakes.sampled_value_attention,
        reference="attend.sampled.reference:sampled_value_attention_reference",
        host="attend.sampled.host:sampled_value_attention",
    ),
    Operator(
        f"team_attention(Tensor q, Tensor k, Tensor v, Tensor teams, {_CACHE}, Tensor seed, int draws, int recent,"
        f" Tensor? sinks=None) -> {_ATTENDED}",
        check=team_checks.team_attention,
        fake=fakes.page_attention,
        reference="attend.sampled.teams:team_attention_reference",
        host="attend.sampled.teams_host:team_attention",
    ),
    Operator(
        "append_teams(Tensor(a!) teams, Tensor k, Tensor? blocks, int block, Tensor? start, Tensor begin, Tensor end,"
        " Tensor? key_mask, int new, int count) -> ()",
        check=team_checks.append_teams,
        fake=fakes.append_teams,
        reference="state.append_teams.reference:append_teams_reference",
        host="state.append_teams.host:append_teams",
    ),
    Operator(
        f"page_teams(Tensor k, {_VIEW}, Tensor? key_mask, int count) -> Tensor",
        check=team_checks.page_teams,
        fake=fakes.page_teams,
        reference="state.append_teams.reference:page_teams_reference",
        host="state.append_teams.host:page_teams",
    ),
    Operator(
        "attach_state(Tensor(a!) state, Tensor k) -> ()",
        check=decode_checks.attach_state,
        fake=fakes.attach_state,
        reference="fakes:attach_state",
        host="fakes:attach_state",
    ),
    Operator(
        "attach_rows(Tensor(a!) mark, Tensor lengths, Tensor mask, Tensor? start, Tensor k) -> ()",
        check=decode_checks.attach_rows,
        fake=fakes.attach_rows,
        reference="fakes:attach_rows",
        host="fakes:attach_rows",
    ),
    Operator(
        "append_pages(Tensor(a!) sums, Tensor(b!) counts, Tensor k, Tensor? blocks, int block, Tensor? start, Tensor begin,"
        " Tensor end, Tensor? key_mask, int new) -> ()",
        check=page_checks.append_pages,
        fake=fakes.append_pages,
        reference="state.append_pages.reference:append_pages_reference",
        host="state.append_pages.host:append_pages",
    ),
    Operator(
        "crop_list(Tensor(a!) since, Tensor(b!) begin, Tensor(c!) counts, Tensor indices, Tensor k, Tensor at) -> ()",
        check=page_checks.crop_list,
        fake=fakes.crop_list,
        reference="state.listed_keys.reference:crop_list_reference",
        host="state.listed_keys.host:crop_list",
    ),
    Operator(
        "list_keys(Tensor(a!) since, Tensor(b!) counts, Tensor(c!) indices, Tensor scores, Tensor lse, Tensor begin, int keys,"
        " float share) -> ()",
        check=page_checks.list_keys,
        fake=fakes.list_keys,
        reference="state.listed_keys.reference:list_keys_reference",
        host="state.listed_keys.host:list_keys",
    ),
    Operator(
        f"listed_attention(Tensor q, Tensor k, Tensor v, {_LISTS}, Tensor since, Tensor? start, Tensor? lengths,"
        " Tensor? key_mask, float scale, Tensor? mask=None, Tensor? sinks=None) -> (Tensor out, Tensor lse)",
        check=decode_checks.listed_attention,
        fake=fakes.page_attention,
        reference="attend.decode.reference:listed_attention_reference",
        host="attend.decode.listed_host:listed_attention",
    ),
    Operator(
        "load_pages(Tensor(a!) pool, Tensor store, Tensor moves) -> ()",
        check=page_checks.load_pages,
        fake=fakes.append_pages,
        reference="state.load_pages.reference:load_pages_reference",
        host="state.load_pages.host:load_pages",
    ),
    Operator(
        f"page_sums(Tensor k, {_VIEW}, Tensor? key_mask) -> (Tensor sums, Tensor counts)",
        check=page_checks.page_sums,
        fake=fakes.page_sums,
        reference="state.append_pages.reference:page_sums_reference",
        host="state.append_pages.host:page_sums",
    ),
    Operator(
        f"page_scores(Tensor q, Tensor sums, Tensor counts, {_VIEW}, int capacity, float scale) -> (Tensor logits, Tensor parts)",
        check=page_checks.page_scores,
        fake=fakes.page_scores,
        reference="score.page_index.reference:page_scores_reference",
        host="score.page_index.host:page_scores",
    ),
    Operator(
        "append_basis(Tensor(a!) basis, Tensor(b!) coords, Tensor(c!) scales, Tensor k, Tensor? blocks, int block, Tensor? start,"
        " Tensor begin, Tensor end, Tensor? key_mask, int new) -> ()",
        check=page_basis_checks.append_basis,
        fake=fakes.append_pages,
        reference="state.append_basis.reference:append_basis_reference",
        host="state.append_basis.host:append_basis",
    ),
    Operator(
        f"page_basis(Tensor k, {_VIEW}, Tensor? key_mask) -> (Tensor basis, Tensor coords, Tensor scales)",
        check=page_basis_checks.page_basis,
        fake=fakes.page_basis,
        reference="state.append_basis.reference:page_basis_reference",
        host="state.append_basis.host:page_basis",
    ),
    Operator(
        "refine_scores(Tensor q, Tensor logits, Tensor counts, Tensor basis, Tensor coords, Tensor scales, Tensor? indices,"
        f" Tensor? list_counts, {_VIEW}, int capacity, float scale) -> (Tensor logits, Tensor parts)",
        check=page_basis_checks.refine_scores,
        fake=fakes.refine_scores,
        reference="score.page_basis.reference:refine_scores_reference",
        host="score.page_basis.host:refine_scores",
    ),
    Operator(
        f"complete_pages(Tensor out, Tensor lse, Tensor logits, Tensor sums, Tensor counts, Tensor indices,"
        f" Tensor list_counts, {_VIEW}, int capacity) -> {_ATTENDED}",
        check=page_basis_checks.complete_pages,
        fake=fakes.complete_pages,
        reference="attend.completion.reference:complete_pages_reference",
        host="attend.completion.host:complete_pages",
    ),
    Operator(
        f"select_pages(Tensor logits, Tensor parts, Tensor counts, {_VIEW}, int capacity, int kv_heads, float[] keep,"
        " int[] table, float mass, int sinks, int recent) -> (Tensor indices, Tensor counts)",
        check=page_checks.select_pages,
        fake=fakes.select_pages,
        reference="select.top_pages.reference:select_pages_reference",
        host="select.top_pages.host:select_pages",
    ),
    Operator(
        "append_projected(Tensor(a!) index, Tensor(b!) positions, Tensor(c!) counts, Tensor query, Tensor key,"
        " Tensor frequencies, Tensor k, Tensor placed, Tensor begin, Tensor end, Tensor? key_mask, int new, int[] heads,"
        " bool interleaved, float factor) -> ()",
        check=projected_checks.append_projected,
        fake=fakes.append_pages,
        reference="state.append_projected.reference:append_projected_reference",
        host="state.append_projected.host:append_projected",
    ),
    Operator(
        "projected_scores(Tensor q, Tensor index, Tensor positions, Tensor query, Tensor frequencies, Tensor? start,"
        " Tensor? lengths, Tensor? key_mask, int[] heads, bool interleaved, float factor) -> (Tensor logits, Tensor parts)",
        check=projected_checks.projected_scores,
        fake=fakes.projected_scores,
        reference="score.projected.reference:projected_scores_reference",
        host="score.projected.host:projected_scores",
    ),
    Operator(
        "join_pages(Tensor indices, Tensor list_counts, Tensor? start, Tensor? lengths, int capacity, int[] owners, int[] sinks,"
        " int[] recent) -> (Tensor indices, Tensor counts)",
        check=projected_checks.join_pages,
        fake=fakes.join_pages,
        reference="select.joined_pages.reference:join_pages_reference",
        host="select.joined_pages.host:join_pages",
    ),
    Operator(
        "routed_attention(Tensor q, Tensor k, Tensor v, Tensor? indices, Tensor? counts, Tensor? start, Tensor? lengths,"
        f" Tensor? key_mask, float scale, bool travel, str group) -> {_ATTENDED}",
        check=routed_checks.routed_attention,
        fake=fakes.routed_attention,
        reference="routed:routed_attention",
        host="routed:routed_attention",
    ),
    Operator(
        "resident_attention(Tensor q, Tensor k, Tensor v, Tensor? start, Tensor? lengths, Tensor? key_mask, float scale)"
        f" -> {_ATTENDED}",
        check=decode_checks.resident_attention,
        fake=fakes.page_attention,
        reference="resident:resident_attention",
        host="resident:resident_attention",
    ),
    Operator(
        "routed_pages(Tensor q, Tensor sums, Tensor counts, Tensor? start, Tensor? lengths, int capacity, float scale,"
        " float[] keep, int[] table, float mass, int sinks, int recent, str group) -> (Tensor indices, Tensor counts)",
        check=routed_checks.routed_pages,
        fake=fakes.routed_pages,
        reference="routed_pages:routed_pages",
        host="routed_pages:routed_pages",
    ),
    Operator(
        "gather_rows(Tensor rows, SymInt length, str group) -> Tensor",
        check=routed_checks.gather_rows,
        fake=fakes.gather_rows,
        reference="routed:gather_rows",
        host="routed:gather_rows",
    ),
    Operator(
        f"context_parallel_attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, float scale, float[] alpha, {_BLOCK_RULE},"
        " str share, bool lookahead, str group) -> Tensor",
        check=routed_checks.context_parallel_attention,
        fake=fakes.context_parallel_attention,
        reference="context_parallel:context_parallel_attention",
        host="context_parallel:context_parallel_attention",
        kept=kept.by_itself,
    ),
    Operator(
        "padding_range(Tensor key_mask) -> (Tensor start, Tensor lengths)",
        check=key_block_checks.padding_range,
        fake=fakes.padding_range,
        reference="common.view:padding_range",
        host="common.mask_range:mask_range",
    ),
    Operator(
        f"key_block_means(Tensor k, {_PADDING}, Tensor? blocks=None, int block=1, {_K_LEN}) -> (Tensor means, Tensor counts)",
        check=key_block_checks.key_block_means,
        fake=fakes.key_block_means,
        reference="score.page_mass.reference:key_block_means_reference",
        host="score.page_mass.host:key_block_means",
    ),
    Operator(
        f"select_key_blocks(Tensor q, Tensor k, Tensor means, Tensor counts, {_PADDING}, float scale, float[] alpha,"
        f" {_BLOCK_RULE}, *, str share='head', bool lookahead=True, {_K_LEN}, int min_queries=0) -> Tensor",
        check=key_block_checks.select_key_blocks,
        fake=fakes.select_key_blocks,
        reference="select.threshold_pages.reference:select_key_blocks_reference",
        host="select.threshold_pages.host:select_key_blocks",
        arguments=arguments.select_key_blocks,
        kept=kept.key_blocks,
    ),
    Operator(
        f"role_key_blocks(Tensor q, Tensor k, Tensor? start, Tensor? lengths, bool[] local, int window, int first_keys, *,"
        f" {_K_LEN}, int min_queries=0) -> Tensor",
        check=key_block_checks.role_key_blocks,
        fake=fakes.role_key_blocks,
        reference="select.role_blocks.reference:role_key_blocks",
        host="select.role_blocks.reference:role_key_blocks",
        arguments=arguments.role_key_blocks,
        kept=kept.key_blocks,
    ),
    Operator(
        f"key_block_attention(Tensor q, Tensor k, Tensor v, Tensor bits, {_CACHE}, bool need_lse, *, {_K_LEN}) -> {_ATTENDED}",
        check=key_block_checks.key_block_attention,
        fake=fakes.key_block_attention,
        reference="attend.pages.reference:key_block_attention_reference",
        host="attend.pages.host:key_block_attention",
    ),
    Operator(
        f"block_sparse_attention(Tensor q, Tensor k, Tensor v, {_CACHE}, float[] alpha, {_BLOCK_RULE}, *, str share='head',"
        f" bool lookahead=True, {_K_LEN}, int min_queries=0, int dense_below=0) -> Tensor",
        check=key_block_checks.block_sparse_attention,
        fake=fakes.token_sparse_attention,
        reference="compose_blocks:block_sparse_attention_reference",
        host="compose_blocks:block_sparse_attention",
        arguments=arguments.block_sparse_attention,
        kept=kept.chosen_again,
    ),
    Operator(
        f"bridge_attention(Tensor q, Tensor k, Tensor v, {_CACHE}, int width, int rows, int sources, int offset, bool need_lse,"
        f" *, {_K_LEN}, int min_queries=0) -> {_ATTENDED}",
        check=key_block_checks.bridge_attention,
        fake=fakes.bridge_attention,
        reference="attend.bridge.reference:bridge_attention_reference",
        host="attend.bridge.host:bridge_attention",
        arguments=arguments.bridge_attention,
    ),
)

for _operator in OPERATORS:
    add(_operator)


def source_tag() -> str:
    """A hash of the table and of what it registers: compile caches see a schema, but neither its fake nor its gradient."""
    tables = ("ops", "registry", "forward_only", "arguments", "types", "fakes", "common/results")
    pages = ("page_checks", "page_basis_checks", "key_block_checks", "projected_checks")
    names = (*tables, "checks", "decode_checks", *pages, "routed_checks", "team_checks")
    files = (Path(__file__).parent / f"{name}.py" for name in names)
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


__all__ = ["LIBRARY", "OPERATORS", "Operator", "add", "observing", "register", "source_tag"]
