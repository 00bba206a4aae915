"""What the rows of own_files.py are made of: small pools of records in several languages."""

from typing import Any

Row = dict[str, Any]


def table(names: str, text: str) -> list[Row]:
    """Read one record per line, whose fields bars separate; an indented line continues the record above."""
    records = text.strip().replace("\n      ", " ").splitlines()
    parts = [
        [part.strip().replace("\\n", "\n") for part in record.split("|")] for record in records
    ]
    return [dict(zip(names.split(), part, strict=True)) for part in parts]


SUPPORT = table(
    "lang q a persona topic mood worse facts why",
    """
    en | When will my parcel arrive? | It left the warehouse today, so expect it on Thursday. | You answer for
      Nordlicht Outdoor and never promise a refund. | shipping | neutral | No idea, ask the courier. | Order 88213:
      packed on Tuesday, express, two working days. | Packed on Tuesday and two working days make Thursday.
    de | Wie kündige ich meinen Tarif? | Schreiben Sie uns bis zum 30. September, dann endet er zum Jahresende. | Du
      bist der Kundendienst der Stadtwerke und siezt immer. | contract | negative | Das geht leider gar nicht. | Tarif
      Ökostrom 24: Frist drei Monate zum Ende des Jahres. | Drei Monate vor dem 31. Dezember ist der 30. September.
    fr | Ma carte a été avalée, que faire ? | Appelez le 09 69 39 00 12, une nouvelle carte part sous 48 heures. |
      Vous conseillez les clients d'une banque lyonnaise, avec calme. | card | negative | Attendez, elle reviendra. |
      Urgences cartes : 09 69 39 00 12, remplacement sous 48 heures. | Une carte avalée est bloquée, il faut donc la
      remplacer.
    es | ¿Puedo cambiar el asiento de mi vuelo? | Sí, gratis hasta 24 horas antes en «Mi reserva». | Eres el asistente
      de una aerolínea y respondes en dos frases. | booking | neutral | Pregunte en el mostrador. | Tarifa Flex: cambio
      de asiento gratuito hasta 24 horas antes. | La tarifa es Flex y faltan tres días para el vuelo.
    zh | 发票抬头写错了怎么办？ | 请在订单页点击“重开发票”，三个工作日内会收到新发票。 |
      你是一家网店的客服，语气礼貌。 | invoice | negative | 写错了就没办法了。 |
      电子发票可在三十天内重开一次，处理需三个工作日。 | 订单只过了两天，所以可以重开。
    it | La lavatrice perde acqua, è in garanzia? | Sì, fino a marzo: il tecnico viene lunedì mattina. | Lavori per
      l'assistenza di un produttore di elettrodomestici. | repair | negative | Provi a stringere il tubo. | Acquisto del
      3 marzo, garanzia di due anni, tecnico libero lunedì. | Due anni dal 3 marzo non sono ancora passati.
    en | Can I book a room with a crib? | Of course, the family room on the second floor has one. | You are the
      receptionist of a small hotel in Galway. | booking | positive | We dislike children here. | Cribs: family room
      (second floor) only, free of charge. | Only one room has a crib, so that is the one to offer.
    pl | Czy mogę zapłacić ratami? | Tak, w trzech ratach bez odsetek przy zakupie od 300 zł. | Jesteś doradcą sklepu
      z elektroniką i piszesz krótko. | payment | neutral | Nie wiem. | Raty 0%: trzy płatności, zamówienia od 300 zł. |
      Koszyk ma 420 zł, więc raty są możliwe.
    ja | ログインできません。どうすればいいですか。 | パスワードを再設定し、十五分後にもう一度お試しください。 |
      あなたは家計簿アプリのサポート担当です。 | account | negative | 諦めてください。 |
      五回失敗すると十五分間ロックされます。 | 五回失敗したので、ロックの解除を待つ必要があります。
    en | Thanks, the new filter works great! Do I need a second one? | Glad to hear it. One lasts about six months. |
      You sell aquarium supplies and love fish. | product | positive | Buy five to be safe. | Filter AQ-2: replace every
      six months in tanks up to 120 litres. | The tank has 90 litres, so one filter is enough.
    """,
)
GERMAN = table(
    "q a rolle klausel klasse zweite grund bild",
    """
    Darf ich einen Hund halten? | Ja, sobald die Vermieterin zugestimmt hat. | Sie beraten Mieter in Köln. | § 8:
      Hunde und Katzen nur mit Zustimmung der Vermieterin. | Mietrecht | Nein, niemals. | Paragraf 8 verlangt eine
      Zustimmung. | mietvertrag_s3.jpg
    Wer zahlt die Kleinreparatur von 60 Euro? | Die Mieterin, denn die Grenze liegt bei 100 Euro. | Sie beraten Mieter
      in Köln und zitieren den Vertrag. | § 11: Kleinreparaturen bis 100 Euro trägt die Mieterin. | Mietrecht | Immer
      der Vermieter. | 60 Euro liegen unter 100 Euro. | hahn_tropft.jpg
    Wie lange ist die Probezeit? | Drei Monate, mit zwei Wochen Kündigungsfrist. | Sie sind Personalerin. | § 2: Die
      ersten drei Monate gelten als Probezeit. | Arbeitsrecht | Ein Jahr. | Der Vertrag weicht von den üblichen sechs
      Monaten ab. | arbeitsvertrag.png
    Bekomme ich Weihnachtsgeld? | Ja, die Hälfte eines Monatsgehalts im November. | Sie antworten knapp und
      freundlich. | § 6: Im November wird ein halbes Monatsgehalt zusätzlich gezahlt. | Arbeitsrecht | Das weiß niemand.
      | Im November steht eine Zahlung im Vertrag. | lohnzettel_11.png
    Ist der Wasserschaden versichert? | Ja, abzüglich der 300 Euro Selbstbeteiligung. | Sie regulieren Schäden. |
      Ziffer 4: Leitungswasser ist versichert, Selbstbeteiligung 300 Euro. | Versicherung | Nein, nur Sturm. |
      Leitungswasser steht in Ziffer 4. | decke_fleck.jpg
    Muss ich den Unfall melden? | Ja, innerhalb einer Woche und am besten in der App. | Sie regulieren Schäden und
      duzen nicht. | Ziffer 9: Schäden sind binnen einer Woche anzuzeigen. | Versicherung | Irgendwann reicht. | Die
      Frist beträgt eine Woche. | stossstange.jpg
    Kann ich den Laptop zurückgeben? | Ja, bis zum 14. Tag nach der Lieferung. | Sie arbeiten im Onlinehandel. |
      Widerruf: vierzehn Tage ab Erhalt der Ware. | Kaufrecht | Nur ungeöffnet. | Seit der Lieferung sind neun Tage
      vergangen. | laptop_karton.jpg
    Wie hoch ist die Mahngebühr? | Fünf Euro ab der zweiten Mahnung. | Sie führen die Buchhaltung. | Nr. 12: Ab der
      zweiten Mahnung werden 5 Euro berechnet. | Kaufrecht | Zwanzig Prozent. | Die erste Mahnung ist kostenlos. |
      mahnung_2.png
    """,
)
PRESS = table(
    "text headline topic tone translation ask titre",
    """
    The river rose by two metres overnight, and the old bridge was closed at dawn. | Flood closes old bridge | weather
      | negative | Der Fluss stieg über Nacht um zwei Meter, im Morgengrauen wurde die alte Brücke gesperrt. | Why was
      the bridge closed? | La crue ferme le vieux pont
    After eleven years, the orchestra returns to the restored hall with Mahler's second. | Orchestra comes home |
      culture | positive | Nach elf Jahren kehrt das Orchester mit Mahlers Zweiter in den sanierten Saal zurück. | What
      will be played? | L'orchestre rentre chez lui
    Prices of copper fell to their lowest level since spring as stocks in Rotterdam grew. | Copper at its lowest since
      spring | economy | negative | Kupfer ist so billig wie zuletzt im Frühjahr, denn in Rotterdam wachsen die Lager. |
      Where did stocks grow? | Le cuivre au plus bas
    The team of Leipzig won in extra time, although it played with ten for an hour. | Ten of Leipzig win | sports |
      positive | Leipzig gewann in der Verlängerung, obwohl es eine Stunde in Unterzahl spielte. | How many players did
      Leipzig have? | Leipzig gagne à dix
    A vaccine against the tick-borne fever passed its second trial with few side effects. | Fever vaccine passes trial
      | health | positive | Ein Impfstoff gegen das Zeckenfieber hat die zweite Studie mit wenigen Nebenwirkungen
      bestanden. | Which trial was it? | Un vaccin prometteur
    The council postponed the tram line again, because the second bid was as expensive as the first. | Tram has to
      wait | politics | negative | Der Rat verschob die Straßenbahn erneut, da auch das zweite Angebot zu teuer war. |
      Why does the tram have to wait? | Le tramway attendra
    Engineers found a way to print bearings from recycled steel in one piece. | Bearings from scrap | science |
      neutral | Ingenieure drucken Lager aus Schrottstahl in einem Stück. | What is printed? | Des roulements recyclés
    The last bookshop of the harbour quarter moves into the former customs house. | Bookshop moves to customs house |
      culture | neutral | Die letzte Buchhandlung des Hafenviertels zieht in das alte Zollhaus. | Where does the
      bookshop move? | La librairie déménage
    """,
)
CODE = table(
    "ask schema sql hint",
    """
    How many employees work in Lyon? | CREATE TABLE staff (id INT, city TEXT) | SELECT count(*) FROM staff WHERE city
      = 'Lyon' | Count rows, not cities.
    List the five most expensive wines. | CREATE TABLE wine (name TEXT, price REAL) | SELECT name FROM wine ORDER BY
      price DESC LIMIT 5 | Sort before you cut.
    Which customers never ordered? | CREATE TABLE client (id INT); CREATE TABLE purchase (client INT) | SELECT id FROM
      client WHERE id NOT IN (SELECT client FROM purchase) | Look for what is missing.
    What was the revenue of 2023? | CREATE TABLE sale (day DATE, amount REAL) | SELECT sum(amount) FROM sale WHERE
      strftime('%Y', day) = '2023' | The year is the first part of the day.
    Average age per team | CREATE TABLE player (team TEXT, age INT) | SELECT team, avg(age) FROM player GROUP BY team
      | One line per team.
    Delete sessions older than a month. | CREATE TABLE session (token TEXT, seen DATE) | DELETE FROM session WHERE
      seen < date('now', '-1 month') | SQLite knows relative dates.
    Names of all rivers, without doubles | CREATE TABLE river (name TEXT, km INT) | SELECT DISTINCT name FROM river |
      One word is enough.
    Raise all hourly wages by 4 percent. | CREATE TABLE wage (person INT, hourly REAL) | UPDATE wage SET hourly =
      hourly * 1.04 | Multiply, do not add.
    """,
)
EXAM = table(
    "ask A B C D right why",
    """
    Which vitamin prevents scurvy? | vitamin A | vitamin C | vitamin D | vitamin K | B | Collagen needs ascorbic acid.
    Which planet has the shortest year? | Venus | Mars | Mercury | Earth | C | It is the closest to the sun.
    Which gas do plants take in? | carbon dioxide | oxygen | helium | argon | A | They build sugar from it.
    Who wrote the Trial? | Mann | Zweig | Rilke | Kafka | D | It appeared in 1925, after his death.
    What is the square root of 225? | 12 | 15 | 25 | 22 | B | Fifteen times fifteen is 225.
    Which organ makes insulin? | liver | spleen | pancreas | kidney | C | Its beta cells do.
    Which metal is liquid at 20 °C? | mercury | lead | tin | zinc | A | It melts at -39 °C.
    In which year did the Berlin Wall fall? | 1985 | 1987 | 1991 | 1989 | D | It was the ninth of November.
    """,
)
SIGHTS = table(
    "ask says file",
    """
    How many people are on the stairs? | Three, and a dog. | coco/train2017/000000033471.jpg
    What does the sign say? | No parking from 8 to 18 o'clock. | signs/munich_0412.jpg
    Is the fracture displaced? | No, the distal radius is in line. | xray/wrist-2291-ap.png
    Quelle est la couleur du toit ? | Le toit est en ardoise bleue. | maisons/IMG_2231.jpeg
    What is the total of this receipt? | 18.40 euros, paid by card. | receipts/2024-02-11.png
    Welches Teil ist verschlissen? | Der Dichtring am linken Ventil. | werkstatt/ventil_07.jpg
    What happens next? | The cup falls from the table. | kitchen/cup_0033.jpg
    图中有几只猫？ | 两只，一只在窗台上。 | cats/pair_118.jpg
    """,
)
TASKS = table(
    "instruction input output",
    """
    Put the sentence into the past tense. | She sells bread at the market. | She sold bread at the market.
    Name three rivers of France. |  | The Loire, the Seine and the Rhône.
    Fasse in einem Satz zusammen. | Der Zug hielt, weil ein Baum auf dem Gleis lag. Nach einer Stunde fuhr er weiter.
      | Ein Baum hielt den Zug eine Stunde auf.
    Write a haiku about fog. |  | Grey wool on the hills\\nthe ferry hums out of sight\\na gull finds the mast
    Corrige la ortografía. | Aver si vienes mañana. | A ver si vienes mañana.
    Convert to JSON. | name Ada, born 1815 | {"name": "Ada", "born": 1815}
    把这句话翻译成英文。 | 今天风很大。 | It is very windy today.
    Suggest a title for a talk on composting. |  | From Peel to Soil
    """,
)
TOOLS = [
    "get_weather",
    "track_parcel",
    "book_table",
    "convert_money",
    "find_train",
    "search_law",
    "read_meter",
]
