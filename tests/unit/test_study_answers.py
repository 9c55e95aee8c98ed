"""The suite's answers, worked out again from the numbers that the tasks state."""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from datetime import date, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from healpass.study.plan.tasks import DOMAINS, load

TASKS = {task.id: task for task in load()}
NUMBERS = [task for task in TASKS.values() if task.kind == "number"]
CHOICES = [task for task in TASKS.values() if task.kind == "choice"]
LABELS = [task for task in TASKS.values() if task.kind == "label"]

#: Numbers that a solution may use although the task does not state them: months in a year, hours,
#: minutes, days in a week, percent, halves and thirds.
COMMON = {0, 1, 2, 3, 7, 12, 60, 100, 1000}


# One function per task of kind `number`, named as the task; its arguments are the quantities.


def finance_simple_interest(principal, days, rate_percent, year_days):
    return principal * rate_percent / 100 * days / year_days


def finance_monthly_compounding(deposit, rate_percent, years):
    return deposit * (1 + rate_percent / 100 / 12) ** int(12 * years)


def finance_level_payment(loan, payments, rate_percent):
    rate = rate_percent / 100
    return loan / sum((1 + rate) ** -month for month in range(1, int(payments) + 1))


def finance_bond_price(face, coupon, years, yield_percent):
    growth = 1 + yield_percent / 100
    coupons = sum(coupon / growth**year for year in range(1, int(years) + 1))
    return coupons + face / growth ** int(years)


def finance_net_present_value(outlay, first, second, third, rate_percent):
    growth = 1 + rate_percent / 100
    return ((third / growth + second) / growth + first) / growth - outlay


def finance_cost_of_capital(equity, equity_cost, debt, debt_cost, tax_percent):
    after_tax = debt_cost * (100 - tax_percent) / 100
    return (equity * equity_cost + debt * after_tax) / (equity + debt)


def finance_sharpe_ratio(fund, risk_free, deviation):
    return (fund - risk_free) / deviation


def finance_currency_proceeds(amount, rate, fee_percent):
    return amount * rate - amount * rate * fee_percent / 100


def finance_part_year_depreciation(cost, residual, years, months):
    return (cost - residual) / (12 * years) * months


def finance_fifo_cost(opening, opening_cost, bought, bought_cost, sold):
    costs = [opening_cost] * int(opening) + [bought_cost] * int(bought)
    return sum(costs[: int(sold)])


def finance_income_tax_bands(free, upper, basic_percent, higher_percent, income):
    basic = (min(income, upper) - free) * basic_percent
    return (basic + max(income - upper, 0) * higher_percent) / 100


def finance_break_even(price, variable, fixed):
    return fixed / (price - variable)


def finance_call_option_profit(contracts, size, strike, premium, spot):
    return contracts * size * (max(spot - strike, 0) - premium)


def finance_liquidity_coverage(cash, bonds, deduction_percent, outflows, inflows, limit_percent):
    assets = cash + bonds * (100 - deduction_percent) / 100
    return 100 * assets / (outflows - min(inflows, outflows * limit_percent / 100))


def finance_margin_call_price(shares, price, maintenance_percent):
    loan = shares * price / 2
    return loan / (1 - maintenance_percent / 100) / shares


def finance_duration_loss(value, duration, rise_percent):
    return value * duration * rise_percent / 100


def finance_tax_in_gross_price(gross, tax_percent):
    return gross * tax_percent / (100 + tax_percent)


def medicine_suspension_volume(dose_per_kg, weight, drug, volume):
    return dose_per_kg * weight / (drug / volume)


def medicine_drop_rate(volume, hours, drops_per_ml):
    return volume * drops_per_ml / (60 * hours)


def medicine_creatinine_clearance(age, weight, creatinine, factor):
    return (140 - age) * weight / (72 * creatinine) * factor


def medicine_body_surface(height, weight):
    return Fraction(math.sqrt(height * weight / 3600))


def medicine_body_mass_index(weight, height):
    return weight / height**2


def medicine_corrected_anion_gap(sodium, chloride, bicarbonate, slope, normal, albumin):
    return sodium - (chloride + bicarbonate) + slope * (normal - albumin)


def medicine_osmolal_gap(sodium, glucose, urea, measured, glucose_divisor, urea_divisor):
    return measured - (2 * sodium + glucose / glucose_divisor + urea / urea_divisor)


def medicine_predictive_value(prevalence, sensitivity, specificity):
    ill = prevalence * sensitivity
    healthy = (100 - prevalence) * (100 - specificity)
    return 100 * ill / (ill + healthy)


def medicine_number_needed_to_treat(control, treated):
    return Fraction(math.ceil(100 / (control - treated)))


def medicine_elimination(half_life, start, hours):
    return Fraction(float(start) / 2 ** float(hours / half_life))


def medicine_loading_dose(target, volume_per_kg, weight, bioavailability):
    return target * volume_per_kg * weight / bioavailability


def medicine_pump_rate(rate, weight, drug, volume):
    return rate * weight * 60 / (drug * 1000 / volume)


def medicine_maintenance_fluid(first_rate, step, second_rate, weight):
    return first_rate * step + second_rate * step + (weight - 2 * step)


def medicine_meal_insulin(grams_per_unit, drop_per_unit, target, meal, glucose):
    return meal / grams_per_unit + (glucose - target) / drop_per_unit


def medicine_post_test_probability(ratio, before):
    odds = ratio * before / (100 - before)
    return 100 * odds / (1 + odds)


def medicine_mean_arterial_pressure(systolic, diastolic):
    return diastolic + (systolic - diastolic) / 3


def medicine_oxygen_cylinder(litres, full, gauge, reserve, flow):
    return litres * (gauge - reserve) / full / flow


def law_default_interest(rate_percent, year_days, debt, days):
    return debt * rate_percent / 100 * days / year_days


def law_shared_fault(damage, fault_percent, paid):
    return damage * (100 - fault_percent) / 100 - paid


def law_inheritance_share(estate, debts, children, grandchildren):
    return (estate - debts) / 2 / children / grandchildren


def law_severance(pay, years, months):
    return pay / 2 * (years + (1 if months > 12 / 2 else 0))


def law_creditor_ranks(assets, costs, bank, wages, supplier, landlord):
    return (assets - costs - bank - wages) * supplier / (supplier + landlord)


def law_turnover_fine(floor, turnover_percent, reduction_percent, turnover):
    highest = max(floor, turnover * turnover_percent / 100)
    return highest * (100 - reduction_percent) / 100


def law_delay_damages(weekly_percent, cap_percent, price, days):
    return min(weekly_percent * math.ceil(days / 7), cap_percent) * price / 100


def law_rent_ceiling(rise_percent, ceiling, area, rent):
    return min(rent * (100 + rise_percent) / 100, ceiling * area)


def law_sentence_credit(sentence, custody):
    return sentence * 2 / 3 - custody


def solution(task):
    return globals()[task.id.replace("-", "_")]


def worked_out(task, **changed):
    quantities = {name: Fraction(value) for name, value in task.quantities}
    return solution(task)(**quantities | changed)


def numbers_in(text):
    return {Fraction(found) for found in re.findall(r"[0-9]+(?:\.[0-9]+)?", text)}


def half_a_last_digit(number):
    return Fraction(1, 2) * Fraction(10) ** Decimal(number).as_tuple().exponent


@pytest.mark.parametrize("task", NUMBERS, ids=lambda task: task.id)
def test_a_number_follows_from_the_quantities_that_the_task_states(task):
    error = abs(worked_out(task) - Fraction(task.answer))
    assert error <= half_a_last_digit(task.answer), "the answer is not the rounded result"
    print(f"error {float(error):.2g} / tolerance {task.tolerance}")
    assert error <= Fraction(task.tolerance), "the exact result would count as wrong"
    stated = numbers_in(task.question)
    assert {Fraction(value) for _, value in task.quantities} <= stated


@pytest.mark.parametrize("task", NUMBERS, ids=lambda task: task.id)
def test_a_tolerance_takes_no_other_answer(task):
    """A tolerance covers rounding, at most 1% of the answer."""
    assert Fraction(task.tolerance) * 100 <= abs(Fraction(task.answer))


#: Quantities that are stated and do not move the answer: another limit binds, or they cancel.
SLACK = {
    ("finance-fifo-cost", "bought"),
    ("finance-margin-call-price", "shares"),
    ("finance-liquidity-coverage", "limit_percent"),
    ("law-severance", "months"),
    ("law-turnover-fine", "floor"),
    ("law-delay-damages", "cap_percent"),
    ("law-delay-damages", "days"),
    ("law-rent-ceiling", "rise_percent"),
    ("law-rent-ceiling", "rent"),
}


@pytest.mark.parametrize("task", NUMBERS, ids=lambda task: task.id)
def test_another_quantity_gives_another_answer(task):
    """The inverse: a wrong number in the text or in the data would be noticed."""
    for name, value in task.quantities:
        step = Fraction(value) / 20
        step = math.ceil(step) if Fraction(value).denominator == 1 else step
        moved = worked_out(task, **{name: Fraction(value) + step})
        changes = abs(moved - Fraction(task.answer)) > Fraction(task.tolerance)
        assert changes != ((task.id, name) in SLACK), name


def literals(function):
    return {
        Fraction(str(node.value))
        for node in ast.walk(function)
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float))
    }


def test_every_number_task_has_its_solution_and_no_solution_brings_numbers_of_its_own():
    module = ast.parse(Path(__file__).read_text())
    defined = [node for node in module.body if isinstance(node, ast.FunctionDef)]
    functions = {f.name: f for f in defined if f.name.startswith(DOMAINS)}
    assert functions.keys() == {task.id.replace("-", "_") for task in NUMBERS}
    for task in NUMBERS:
        allowed = COMMON | numbers_in(task.question)
        assert literals(functions[task.id.replace("-", "_")]) <= allowed


def test_the_suite_has_its_size_and_is_balanced():
    per_domain = Counter(task.domain for task in TASKS.values())
    assert set(per_domain) == set(DOMAINS)
    assert min(per_domain.values()) >= 20
    assert len(TASKS) >= 60
    letters = Counter(task.answer for task in CHOICES)
    assert set(letters) == set("ABCD")
    assert max(letters.values()) <= 0.4 * len(CHOICES), "always one letter must not do well"


def test_the_datasheet_counts_what_there_is():
    datasheet = (Path(__file__).parents[2] / "docs/professional-short-answers.md").read_text()
    kinds = Counter((task.domain, task.kind) for task in TASKS.values())
    for domain in DOMAINS:
        counts = [kinds[domain, kind] for kind in ("number", "choice", "label")]
        assert f"| {domain} | {' | '.join(map(str, [*counts, sum(counts)]))} |" in datasheet
    assert f"\n{len(TASKS)} short tasks" in datasheet
    assert f"of the {len(NUMBERS)} numbers" in datasheet


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.id)
def test_a_task_is_whole_and_says_why_its_answer_is_right(task):
    assert task.id.startswith(f"{task.domain}-")
    assert task.justification.endswith(".")
    assert "\n" not in task.justification + task.question
    assert task.question.isascii()
    assert task.justification.isascii()
    assert not re.search(r"\b(today's|current (?:law|rate)|now in force)\b", task.question)


@pytest.mark.parametrize("task", LABELS, ids=lambda task: task.id)
def test_the_labels_of_a_task_stand_in_its_question(task):
    assert all(re.search(rf"\b{label}", task.question) for label in task.options)


def right_option(task_id):
    task = TASKS[task_id]
    return task.options["ABCD".index(task.answer)]


def test_the_dates_of_law_are_those_of_the_calendar():
    learned = date(2020, 2, 3)
    assert right_option("law-limitation-period") == f"31 December {learned.year + 3}"
    served = date(2023, 3, 4)  # a year in which 4 March is a Saturday, as the task says
    last = served + timedelta(days=14)
    assert (f"{served:%A}", f"{last:%A}") == ("Saturday", "Saturday")
    monday = last + timedelta(days=2)
    assert right_option("law-reply-deadline") == f"{monday:%A}, {monday.day} {monday:%B}"
    assert date(2024, 8, 20) < date(2019 + 5, 9, 1), "less than five years: two months' notice"
    assert right_option("law-notice-period") == "31 October 2024"
    assert date(2023, 6, 9) + timedelta(days=14) == date(2023, 6, 23)
    assert TASKS["law-consumer-withdrawal"].answer == "timely"
    assert f"31 December {2021 + 6}" in right_option("law-data-retention")


def test_the_comparisons_of_finance_and_law_come_out_as_their_answers_say():
    totals = {
        "Northbank": Fraction(10900),
        "Southbank": 10000 * Fraction("1.022") ** 4,
        "Eastbank": 10000 * Fraction("1.085") + 30,
        "Westbank": 10000 * Fraction("1.007") ** 12,
    }
    assert right_option("finance-cheapest-loan").startswith(min(totals, key=totals.__getitem__))
    assert Fraction(84) / Fraction("24.5") <= Fraction("3.5")
    assert Fraction("24.5") / Fraction("6.4") < 4
    assert TASKS["finance-loan-covenants"].answer == "breached"
    assert 25000 + 30000 < 90000 <= 25000 + 30000 + 35000
    assert right_option("finance-payback-year") == "The third year"
    assert (Fraction(21, 41) >= Fraction(1, 2), Fraction(12, 18) >= Fraction(2, 3)) == (True, True)
    assert TASKS["law-quorum-and-majority"].answer == "carried"


@pytest.mark.parametrize(
    ("option", "bought", "more"),
    [(0, "Topaz", 1), (1, "Pine", 2), (2, "Quartz", 3), (3, "Umber", 9)],
)
def test_exactly_one_purchase_keeps_the_limits(option, bought, more):
    held = Counter(Pine=9.0, Quartz=8.0, Reed=8.0, Slate=7.0, Topaz=4.5)
    held[bought] += more
    keeps = max(held.values()) <= 10 and sum(v for v in held.values() if v > 5) <= 40
    task = TASKS["finance-issuer-limits"]
    assert bought in task.options[option]
    assert keeps == ("ABCD"[option] == task.answer)
